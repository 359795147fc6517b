"""Looks at generated text; the rule for repetition loops is the library's own."""

from specdec.loops import MAX_PERIOD, loop_start

__all__ = ["MAX_PERIOD", "loop_start"]
