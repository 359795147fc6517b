"""What `specdec train` and `specdec data` run, and what they print."""
