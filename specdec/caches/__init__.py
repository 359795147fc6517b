"""KV caches: trees, states that can be put back, and the cache that the user keeps."""
