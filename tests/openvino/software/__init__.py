"""Finding, installing and upgrading OpenVINO."""
