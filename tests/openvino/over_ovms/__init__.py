"""The driver over the stand-in for ovms: what it may not count on with the OpenVINO Model Server."""
