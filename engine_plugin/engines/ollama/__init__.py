"""Ollama: a server that somebody runs on this machine or elsewhere, or one of our own."""
