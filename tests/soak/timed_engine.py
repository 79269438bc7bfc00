"""The fake engine with a short journal that has the time when a request lost its client."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.fake_engine import program

__all__ = ["install", "main"]

_KEPT = ("started", "left", "refused", "bind_refused", "exiting")


class BriefStory(program.Story):
    """Writes the system-wide time and the events that a soak needs."""

    def tell(self, event: str, **facts: Any) -> None:
        if event in _KEPT:
            super().tell(event, at=time.monotonic(), **facts)


class TaggedConnection(program.Connection):
    """Knows its requests by their `user`."""

    _tag = ""

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> None:
        self._tag = json.loads(body).get("user", "") if body else ""
        try:
            await super()._answer(path, headers, body)
        finally:
            self._tag = ""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._tag:
            self.server.story.tell("left", user=self._tag)
        super().connection_lost(exc)


def install(executable: Path, script: Path, lifetime: float) -> None:
    """Write an executable that follows `script` and lives no longer than `lifetime` seconds."""
    executable.parent.mkdir(parents=True, exist_ok=True)
    # Isolated and without site-packages, since it is started all the time.
    executable.write_text(
        f"#!{sys.executable} -IS\nimport sys\n"
        "if sys.argv[1:] == ['--version']:\n"
        "    sys.stderr.write('version: 9999 (fake)\\nbuilt for tests\\n')\n"
        "    sys.exit(0)\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        f"from tests.soak import timed_engine\ntimed_engine.main(sys.argv[1:], {str(script)!r}, {round(lifetime)})\n"
    )
    executable.chmod(0o755)


def main(argv: list[str], script: str, lifetime: int) -> None:
    """Run the engine."""
    # Where `program` looks for them; it has no other place for what a variant does differently.
    vars(program).update(Story=BriefStory, Connection=TaggedConnection, LIFETIME=lifetime)
    program.main(argv, script)
