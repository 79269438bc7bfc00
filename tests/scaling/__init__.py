"""One plugin, a cluster behind it: opt-in tests on Ray Serve."""
