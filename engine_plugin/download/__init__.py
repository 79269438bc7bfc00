"""Downloads over HTTP: they resume where they stopped, and verify size and SHA-256."""
