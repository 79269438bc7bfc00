"""The engine's lifecycle under the real driver, with a fake engine that fails in every way."""
