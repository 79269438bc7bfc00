"""Counters of a soak, and the text of what must not happen."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Crash", "Tally"]

_KEPT = 40
_PARTICULAR = re.compile(r"/\S+|\d+(\.\d+)?|(?<=Last lines: ).*")


@dataclass(slots=True)
class Crash:
    """An engine that was killed or frozen to death. Times are the event loop's."""

    model: str
    at: float
    frozen: bool = False
    answered: float | None = None
    """When the first request that began after it got its first bytes."""


@dataclass(slots=True)
class Tally:
    """Filled in by load and mishaps."""

    counts: Counter[str] = field(default_factory=Counter)
    crashes: list[Crash] = field(default_factory=list)
    cancelled: dict[str, float] = field(default_factory=dict)
    """When the client left a stream that had begun, by the stream's tag; comparable with the engine's clock."""
    noticed: list[float] = field(default_factory=list)
    """Seconds from the abandonment of a stream until the engine noticed, where measured."""
    surprises: Counter[str] = field(default_factory=Counter)
    """What must not happen: a text, and how often."""
    messages: Counter[str] = field(default_factory=Counter)
    """The errors that calls ended with, numbers and names of files left out."""
    waited_for: list[str] = field(default_factory=list)
    """What the plugin's tasks waited for when the first call did not end."""
    longest_silence: float = 0.0
    """Seconds in which no stream was completed."""
    _last_completed: float = 0.0

    def surprise(self, text: str) -> None:
        """Note what must not happen."""
        if text in self.surprises or len(self.surprises) < _KEPT:
            self.surprises[text] += 1

    def failed(self, what: str, error: Exception, allowed: Iterable[int]) -> None:
        """Note an error that a call ended with; of a code that is not allowed it is a surprise."""
        code = getattr(error, "code", 0)
        self.counts[f"{what}: {code}"] += 1
        self.messages[f"{code} {_general(str(error))}"] += 1
        if code not in allowed:
            self.surprise(f"{what}: {type(error).__name__} ({code}): {error}")

    def crashed(self, model: str, *, frozen: bool = False) -> None:
        """An engine of this model is being killed, or frozen to death, now."""
        self.crashes.append(Crash(model, asyncio.get_running_loop().time(), frozen))

    def answered(self, model: str, began: float) -> None:
        """The first bytes have come of a call that began then."""
        for crash in reversed(self.crashes):
            if crash.model == model and crash.at <= began:
                if crash.answered is None:
                    crash.answered = asyncio.get_running_loop().time()
                else:
                    return

    def loaded(self) -> None:
        """The load begins: silence counts from here on."""
        self._last_completed = asyncio.get_running_loop().time()

    def completed(self) -> None:
        """Note that a stream has ended properly."""
        self.counts["streams completed"] += 1
        self.heard()

    def heard(self) -> None:
        """A silence ends here."""
        now = asyncio.get_running_loop().time()
        self.longest_silence = max(self.longest_silence, now - self._last_completed)
        self._last_completed = now


def _general(message: str) -> str:
    """The message as it is for all of its kind."""
    return _PARTICULAR.sub("…", message)[:160]
