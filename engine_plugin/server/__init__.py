"""The gRPC face of a plugin: the server seam, the ProviderService servicer and the generated stubs."""
