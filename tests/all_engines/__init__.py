"""The same tests of the services on every engine, as a host calls them: as shipped, spawned, over gRPC."""
