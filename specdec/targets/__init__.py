"""The model behind its cache, and the tests that say how it can be verified."""
