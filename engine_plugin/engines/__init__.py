"""Engines: what starts, feeds and stops an inference engine. One folder per engine family."""
