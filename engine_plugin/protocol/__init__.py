"""The wire of docs/protocol.md, as both the plugin and its hosts use it."""
