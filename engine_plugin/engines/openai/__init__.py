"""Any server that speaks OpenAI's REST as an engine: attached to, never started, stopped or installed."""
