"""Every private or version-dependent name of transformers, and nothing else."""
