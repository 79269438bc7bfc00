"""Detection, installation and upgrade of OpenVINO."""
