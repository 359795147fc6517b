"""From records to figures: intervals, acceptance, speed-ups."""
