"""Judges a running process by its health checks, and by its use of the processor while they fail.

`engine_process` makes the checks and acts on the result; it also notices the process's exit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_plugin.process import tree
from engine_plugin.system.files import in_thread

__all__ = ["HealthRecord", "ProcessorUse"]

_SUCCESSES = 2  # answers in a row
_EFFORT = 0.01  # the share of a processor's time that counts as work


@dataclass(eq=False)
class HealthRecord:
    """The latest health checks of one run, from its first ready moment on. A busy process misses some.

    After `failures` in a row without an answer a ready process is degraded, after two answers in a row it is ready
    again. After `hung_after` seconds (0: never) without an answer or another sign of life, which is output or use of
    the processor, it is hung, which counts as a death.
    """

    failures: int
    hung_after: float
    sign_of_life: float
    """When the last answer, output or use of the processor was noticed, by the loop's clock."""

    degraded: bool = False
    silent: bool = False
    """Whether the latest answer was missing."""

    _streak: int = 0  # answers in a row that speak against `degraded` as it is

    def note(self, *, answered: bool, now: float) -> None:
        """Take one health check into account."""
        self.silent = not answered
        if answered:
            self.sign_of_life = now
        if answered is not self.degraded:
            self._streak = 0
            return
        self._streak += 1
        if self._streak >= (_SUCCESSES if self.degraded else self.failures):
            self.degraded = not self.degraded
            self._streak = 0

    def hung(self, now: float) -> bool:
        """Whether the last sign of life is too long ago."""
        return bool(self.hung_after) and now - self.sign_of_life >= self.hung_after


@dataclass(eq=False)
class ProcessorUse:
    """The processor time of one process and its descendants, by which a busy process differs from a hung one.

    The first look counts from the spawn on.
    """

    pid: int
    _seconds: float | None = field(default=0.0, init=False)

    async def grew(self, seconds: float) -> bool | None:
        """Whether the process computed in the `seconds` since the last look; None without a last look.

        It looks at every process of the machine, so call it only when nothing else shows that the process lives.
        """
        before = self._seconds
        self._seconds = await in_thread(tree.processor_seconds, self.pid)
        return None if before is None else self._seconds > before + _EFFORT * seconds

    def forget(self) -> None:
        """Drop the last look: the next interval begins with the next look."""
        self._seconds = None
