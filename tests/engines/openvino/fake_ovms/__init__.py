"""A stand-in for the `ovms` program, and release archives of it: see `program` and `archives`."""
