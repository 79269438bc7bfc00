"""HTTP to an engine: a lean HTTP/1.1 client, server-sent events and JSON lines kept whole, and what answers mean."""
