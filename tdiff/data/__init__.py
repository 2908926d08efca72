"""Images: sources, shards with their manifest, the order (pure functions), the reader."""
