"""Downloading files over HTTP: going on where a download stopped, believing nothing that is not verified."""
