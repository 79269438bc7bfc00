"""A llama-server of the tests' own: see `program` for what it can be told to do.

    fake = FakeEngine.install(folder)
    fake.behave({"load_seconds": 0.2}, {"rules": [{"on": "chat", "do": "die", "code": 3}]})   # first life, later ones
    … engine: {backend: llama-server, llama_server: str(fake.executable)} …
    begun = await fake.event("begun", service="chat")

Nothing goes through this process's environment, so any number of them stand side by side.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FakeEngine"]

_PAUSE = 0.003


@dataclass(frozen=True)
class FakeEngine:
    """An executable, the script that it follows, and the journal that it keeps."""

    executable: Path
    script: Path

    @classmethod
    def install(cls, folder: Path, *lives: dict[str, Any]) -> FakeEngine:
        """Write an executable called llama-server into `folder`, which need not exist. POSIX only."""
        folder.mkdir(parents=True, exist_ok=True)
        fake = cls(folder / "llama-server", folder / "fake.json")
        here = str(Path(__file__).parent)
        # Isolated and without site-packages: it starts in 60 ms, and finds its own bytecode.
        fake.executable.write_text(
            f"#!{sys.executable} -IS\nimport sys\n"
            "if sys.argv[1:] == ['--version']:\n"
            "    sys.exit(sys.stderr.write('version: 9999 (fake)\\nbuilt for tests\\n') and 0)\n"
            f"sys.path.insert(0, {here!r})\nimport program\nprogram.main(sys.argv[1:], {str(fake.script)!r})\n"
        )
        fake.executable.chmod(0o755)
        fake.behave(*lives)
        return fake

    @property
    def options(self) -> dict[str, str]:
        """What selects it in plugin.yaml's `engine:` section."""
        return {"backend": "llama-server", "llama_server": str(self.executable)}

    def behave(self, *lives: dict[str, Any], **of_models: list[dict[str, Any]]) -> None:
        """Set the script: the lives of every model, and those of some (`tiny_embed=[{…}]`). Rules that a running
        process follows change with its next request."""
        named = {name.replace("_", "-"): lives for name, lives in of_models.items()}
        scratch = self.script.with_suffix(".new")
        scratch.write_text(json.dumps({"*": list(lives) or [{}], **named}))
        scratch.replace(self.script)

    def gate(self, name: str) -> Path:
        """A file that does not exist yet, for `…_until` and `hold`: `touch` it to go on."""
        return self.script.with_name(f"gate-{name}")

    def events(self, event: str = "", **facts: Any) -> list[dict[str, Any]]:
        """The journal so far; only these events, with these facts."""
        journal = self.script.with_suffix(".journal")
        if not journal.exists():
            return []
        whole = journal.read_bytes().rpartition(b"\n")[0].splitlines()
        lines = [json.loads(line) for line in whole]
        wanted = {"event": event, **facts} if event else facts
        return [line for line in lines if wanted.items() <= line.items()]

    async def event(self, event: str, *, count: int = 1, seconds: float = 10.0, **facts: Any) -> dict[str, Any]:
        """Wait until the journal has `count` such events; the last of those. Raises TimeoutError with the journal."""
        from tests.patience import patience  # a soak's engine, without site-packages, imports this package

        size = -1
        try:
            async with asyncio.timeout(patience(seconds)):
                while True:
                    now = self._journal_size()
                    if now != size:
                        size = now
                        found = self.events(event, **facts)
                        if len(found) >= count:
                            return found[count - 1]
                    await asyncio.sleep(_PAUSE)
        except TimeoutError:
            story = "\n".join(str(line) for line in self.events())
            raise TimeoutError(f"no {count} × {event} {facts} in {seconds:g} s. The journal:\n{story}") from None

    def _journal_size(self) -> int:
        try:
            return os.stat(self.script.with_suffix(".journal")).st_size  # noqa: PTH116  # many times a second
        except FileNotFoundError:
            return 0
