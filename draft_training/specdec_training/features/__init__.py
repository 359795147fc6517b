"""What a target says about a batch: computed by the target, or recorded and read back."""
