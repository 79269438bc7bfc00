"""The embedded server: OVMS's REST on openvino-genai, a worker process for each model. Runs in its own process."""
