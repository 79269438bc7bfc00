"""The command `engine-plugin`, for people. See docs/cli.md."""

from __future__ import annotations

__all__ = ["COMMANDS"]

COMMANDS = {
    **{name: name for name in ("chat", "completion", "engine", "host", "lint", "models", "serve", "status")},
    **dict.fromkeys(("embed", "image", "rerank", "speak", "transcribe"), "services"),
}
"""The names of the commands, each with the module of this package that defines it."""
