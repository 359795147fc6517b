"""What a forward costs on this machine, and the sizes chosen by it."""
