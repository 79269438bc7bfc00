"""The default plugin as a host's child process, with its socket and its real engine."""
