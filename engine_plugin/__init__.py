"""engine-plugin: a local AI engine under an orchestrator's control."""

__all__ = ["PLUGIN_DIR", "__version__"]

__version__ = "0.1.0"

PLUGIN_DIR = "ENGINE_PLUGIN_DIR"
"""The environment variable that names the directory of the plugin to take, whatever else there is."""
