"""One round: trees, picks, the walk."""
