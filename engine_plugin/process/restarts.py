"""The restarts of a process that died: their back-off, and how many there are in a row."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Restarts"]


@dataclass(eq=False)
class Restarts:
    """Counts the deaths in a row of one process. Owned by its supervisor.

    The first restart waits `backoff` seconds, each further one twice as long, at most `longest`. The death of a
    process that served for `stable` seconds counts as a first one.
    """

    limit: int
    """Restarts in a row without a request; with 0 a dead process is not restarted."""

    backoff: float
    stable: float
    longest: float = 30.0
    deaths: int = 0

    def after_death(self, served: float) -> float | None:
        """Seconds until the restart of a process that died after `served` seconds; None: no restart."""
        if served >= self.stable:
            self.deaths = 0
        self.deaths += 1
        if self.deaths > self.limit:
            return None
        doublings = min(self.deaths - 1, 62)
        return min(self.backoff * 2.0**doublings, self.longest)

    def forget(self) -> None:
        """Count from zero again, after a stop."""
        self.deaths = 0
