"""Engines' software: archives and packages chosen, fetched, verified, unpacked, tried and switched to."""
