"""llama.cpp as an engine: one server process per loaded model, from xllamacpp or a llama-server binary.

Kept empty, since the runner imports this package inside every engine process.
"""
