"""The engine's whole life under the real driver, with a fake engine that fails in every way: nothing may break it."""
