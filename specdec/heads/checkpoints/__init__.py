"""Draft heads on disk: all dialects in, and out."""
