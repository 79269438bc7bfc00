"""The engine llamacpp: one server process per loaded model, from xllamacpp or a llama-server binary.

This module is empty because the runner imports it in each engine process.
"""
