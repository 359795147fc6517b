"""Arms in another process, behind an OpenAI-compatible address."""
