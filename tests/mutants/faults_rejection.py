"""Faults in rejection sampling: the draft's law, acceptance and the residual."""

from mutants.fault import Fault

REJECTION: tuple[Fault, ...] = ()
