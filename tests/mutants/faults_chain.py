"""Faults in chain mode: snapshots, re-feeding, and models that only take one path a row."""

from mutants.fault import Fault

CHAIN: tuple[Fault, ...] = ()
