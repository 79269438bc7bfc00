"""The restarts of a process that died: their back-off, and how many there are in a row."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RestartPolicy", "Restarts"]


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """`limit` is the number of restarts in a row without a request; with 0 a dead process is not restarted. The other
    values are seconds.

    The first restart waits `backoff`, each further one twice as long, at most `longest`. The death of a process that
    served for `stable` counts as a first one.
    """

    limit: int = 3
    backoff: float = 0.5
    longest: float = 30.0
    stable: float = 60.0


class Restarts:
    """Counts the deaths in a row of one process. Owned by its supervisor."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self.deaths = 0

    def after_death(self, served: float) -> float | None:
        """Seconds until the restart of a process that died after `served` seconds; None: no restart."""
        if served >= self.policy.stable:
            self.deaths = 0
        self.deaths += 1
        if self.deaths > self.policy.limit:
            return None
        doublings = min(self.deaths - 1, 62)
        return min(self.policy.backoff * 2.0**doublings, self.policy.longest)

    def forget(self) -> None:
        """Count from zero again, after a stop."""
        self.deaths = 0
