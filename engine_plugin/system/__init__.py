"""What depends on the operating system: files, private directories, trust in programs, limits, addresses."""
