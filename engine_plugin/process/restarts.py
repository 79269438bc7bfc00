"""When a process that died is started again: after a back-off, so many times in a row, until it lives for a while."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RestartPolicy", "Restarts"]


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds, but for `limit`: the restarts in a row that nobody asked for; 0 leaves a dead process dead.

    The first restart waits `backoff`, each further one twice as long, none longer than `longest`. A process that
    served for `stable` has proved itself: its death counts as a first one.
    """

    limit: int = 3
    backoff: float = 0.5
    longest: float = 30.0
    stable: float = 60.0


class Restarts:
    """Counts the deaths in a row of one process. Owned by its actor."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self.deaths = 0

    def after_death(self, served: float) -> float | None:
        """Seconds to wait before the next start of a process that served so long; None: leave it dead."""
        if served >= self.policy.stable:
            self.deaths = 0
        self.deaths += 1
        if self.deaths > self.policy.limit:
            return None
        doublings = min(self.deaths - 1, 62)
        return min(self.policy.backoff * 2.0**doublings, self.policy.longest)

    def forget(self) -> None:
        """A stop that was asked for: what comes after it is a new beginning."""
        self.deaths = 0
