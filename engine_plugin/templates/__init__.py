"""Chat templates of models: untrusted programs, rendered in a process of their own within bounds."""
