"""The driver over the stand-in for ovms, which lacks some features of the embedded server."""
