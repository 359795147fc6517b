"""`specdec bench run`: prompts, arms, clocks and the order in which they alternate."""
