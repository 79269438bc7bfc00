"""Judging a living process by its answers: one that is busy misses some, and is not dead for that."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HealthPolicy", "HealthRecord"]


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """Ask every `interval` seconds. So many `failures` in a row make a ready process degraded, so many `successes`
    in a row make it ready again. After `hung_after` seconds (0: never) without an answer or another sign of life,
    output or use of the processor, it is hung, which counts as a death."""

    interval: float = 5.0
    failures: int = 3
    successes: int = 2
    hung_after: float = 120.0


class HealthRecord:
    """The latest answers of one process, from its first ready moment on. Owned by its life."""

    def __init__(self, policy: HealthPolicy, now: float) -> None:
        self._policy = policy
        self._streak = 0  # answers in a row that speak against `degraded` as it is
        self._sign_of_life = now
        self.degraded = False
        self.silent = False
        """Whether the latest answer was missing."""

    def note(self, *, answered: bool, now: float) -> None:
        """Take one answer, or the want of it, into account."""
        self.silent = not answered
        if answered:
            self.alive(now)
        if answered is not self.degraded:
            self._streak = 0
            return
        self._streak += 1
        if self._streak >= (self._policy.successes if self.degraded else self._policy.failures):
            self.degraded = not self.degraded
            self._streak = 0

    def alive(self, now: float) -> None:
        """Something shows that the process is not hung."""
        self._sign_of_life = now

    def hung(self, now: float) -> bool:
        """Whether it has shown no sign of life for too long."""
        return bool(self._policy.hung_after) and now - self._sign_of_life >= self._policy.hung_after
