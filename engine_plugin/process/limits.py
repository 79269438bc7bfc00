"""The options in plugin.yaml's `engine:` section for the process of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ProcessLimits"]


@dataclass(frozen=True)
class ProcessLimits:
    """The options in plugin.yaml's `engine:` section for a process, with their bounds. Times are seconds."""

    start_timeout: float = field(default=60, metadata={"min": 1, "max": 86_400})
    """How long a start may show no progress."""

    start_limit: float = field(default=1800, metadata={"min": 1, "max": 86_400})
    """How long a start may take in all."""

    stop_timeout: float = field(default=1.0, metadata={"min": 0.05, "max": 60})
    """How long a process may take to stop before it is killed."""

    restart_limit: int = field(default=3, metadata={"min": 0, "max": 1000})
    """How often in a row a process that died is restarted without a request."""

    restart_backoff: float = field(default=0.5, metadata={"min": 0, "max": 3600})
    """How long the first restart waits; each further one waits twice as long, at most 30 seconds."""

    stable_time: float = field(default=60, metadata={"min": 0, "max": 86_400})
    """How long a process must have served for its death to count as a first one."""

    health_interval: float = field(default=5, metadata={"min": 0.05, "max": 3600})
    """How often the server gets a health check."""

    health_failures: int = field(default=3, metadata={"min": 1, "max": 1000})
    """How many missing answers in a row make it degraded; two answers in a row make it ready again."""

    hung_timeout: float = field(default=120, metadata={"min": 0, "max": 86_400})
    """How long it may show no sign of life before it is killed and restarted; 0: for ever."""
