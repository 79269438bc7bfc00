"""The engine `ollama`: uses an attached Ollama server, or installs and runs a managed one."""
