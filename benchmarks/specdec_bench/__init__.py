"""Measurement of speed-up: harness, replay, tuner, report and gate."""
