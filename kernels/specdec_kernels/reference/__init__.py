"""Every kernel in plain torch: what the fused ones are tested against, and what a CPU runs."""
