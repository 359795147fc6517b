"""The door to Hugging Face: a prepared `generate` call, in and out."""
