"""The command `engine-plugin`, for people. See docs/cli.md."""
