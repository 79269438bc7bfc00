"""The plugin's side of hashicorp/go-plugin: handshake, logging, standard output, listening, shutdown."""
