"""Being the child of a hashicorp/go-plugin host: handshake, logging, standard output, listening, ending in time."""
