"""What the plugin costs, measured: `python -m benchmarks`. docs/performance.md explains it and has a baseline."""

from __future__ import annotations

__all__: list[str] = []
