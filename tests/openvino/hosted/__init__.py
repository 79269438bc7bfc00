"""The default plugin as a host has it: spawned, served over its socket, its real engine below it."""
