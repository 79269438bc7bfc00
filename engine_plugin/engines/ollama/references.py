"""The references by which models outside the plugin's store were pulled: a file of them, each with its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.system.files import in_thread, private_folder, read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Reference", "References"]

_MOST = 1024
"""References that are kept: the latest."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The model that a reference stood for: its name and its digest, for the name may be another model's by now."""

    name: str
    digest: str


class References:
    """The references in one file, which this user alone can read. Owned by an engine, used from one event loop."""

    def __init__(self, path: Path | None = None) -> None:
        """No I/O: the file is read when a reference is first asked for. Without one this process alone remembers."""
        self._path = path
        self._known: dict[str, Reference] | None = None

    async def get(self, reference: str) -> Reference | None:
        """What a reference stands for."""
        return (await self._read()).get(reference)

    async def by_model(self) -> dict[Reference, tuple[str, ...]]:
        """The references that stand for each model."""
        found: dict[Reference, tuple[str, ...]] = {}
        for reference, model in (await self._read()).items():
            found[model] = (*found.get(model, ()), reference)
        return found

    async def put(self, reference: str, model: Reference) -> None:
        """Have a reference stand for a model from now on. Raises OSError."""
        known = await self._read()
        known.pop(reference, None)  # the latest are last
        known[reference] = model
        await self._write(dict(list(known.items())[-_MOST:]))

    async def forget(self, name: str) -> None:
        """The model of that name is gone. Raises OSError."""
        known = await self._read()
        rest = {reference: model for reference, model in known.items() if model.name != name}
        if rest.keys() != known.keys():
            await self._write(rest)

    async def _read(self) -> dict[str, Reference]:
        if self._known is None:
            shape = (await in_thread(read_json, self._path) if self._path else None) or {}
            self._known = {
                reference: Reference(str(entry["name"]), str(entry["digest"]))
                for reference, entry in shape.items()
                if isinstance(entry, dict) and {"name", "digest"} <= entry.keys()
            }
        return self._known

    async def _write(self, known: dict[str, Reference]) -> None:
        self._known = known
        path = self._path
        if path is None:
            return
        shape = {reference: {"name": model.name, "digest": model.digest} for reference, model in known.items()}

        def write() -> None:
            private_folder(path.parent)
            write_json(path, shape, path.parent)

        await in_thread(write)
