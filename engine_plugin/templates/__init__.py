"""Models' chat templates: untrusted programs, rendered in a separate process with limits."""
