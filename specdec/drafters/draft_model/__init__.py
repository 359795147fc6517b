"""A small model drafts."""
