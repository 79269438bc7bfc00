"""engine-plugin: a local AI engine under an orchestrator's control."""

__all__ = ["__version__"]

__version__ = "0.1.0"
