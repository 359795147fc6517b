"""What a head is to learn: the loss of a batch over all TTT steps, and its gradient."""
