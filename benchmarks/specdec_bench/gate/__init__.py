"""`specdec bench gate`: two runs compared."""
