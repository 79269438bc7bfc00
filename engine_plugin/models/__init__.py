"""Model stores: what models are on this machine, and how they get there."""
