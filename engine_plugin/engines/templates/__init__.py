"""Chat templates of models: programs from somebody else, rendered in a process of their own within bounds."""
