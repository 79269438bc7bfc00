"""The plugin's gRPC server: the seam to the gRPC library, ProviderService, and what single hosts need beyond it."""
