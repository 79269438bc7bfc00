"""The token's way: a lean HTTP client of engines, whole events, and what an engine's answers mean."""
