"""The references by which models of a server were pulled, in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from engine_plugin.manifest.paths import is_file
from engine_plugin.system.files import in_thread, private_folder, read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Reference", "References"]

_MAX_REFERENCES = 1024
"""How many references are kept, the latest ones."""


class Reference(NamedTuple):
    """The model of a reference. The digest detects that the name belongs to another model now."""

    name: str
    digest: str


class References:
    """The references in a file that only this user can read. Owned by the engine, used from one event loop."""

    def __init__(self, path: Path | None = None) -> None:
        """No I/O: the first use reads the file. Without a path the references are kept in memory only."""
        self._path = path
        self._known: dict[str, Reference] | None = None

    async def get(self, reference: str) -> Reference | None:
        """The model of a reference; None if it is unknown."""
        return (await self._read()).get(reference)

    async def by_model(self) -> dict[Reference, tuple[str, ...]]:
        """The references of each model."""
        found: dict[Reference, tuple[str, ...]] = {}
        for reference, model in (await self._read()).items():
            found[model] = (*found.get(model, ()), reference)
        return found

    async def put(self, reference: str, model: Reference) -> None:
        """Set the model of a reference and write the file. Raises OSError."""
        known = await self._read()
        known.pop(reference, None)  # the latest are last
        known[reference] = model
        await self._write(dict(list(known.items())[-_MAX_REFERENCES:]))

    async def forget(self, name: str) -> None:
        """The model of that name is gone. Raises OSError."""
        known = await self._read()
        rest = {reference: model for reference, model in known.items() if model.name != name}
        if rest.keys() != known.keys():
            await self._write(rest)

    async def _read(self) -> dict[str, Reference]:
        if self._known is None:
            shape = None
            if self._path and is_file(self._path):  # most plugins have none, and need no thread to find that
                shape = await in_thread(read_json, self._path)
            self._known = {
                reference: Reference(str(entry["name"]), str(entry["digest"]))
                for reference, entry in (shape or {}).items()
                if isinstance(entry, dict) and {"name", "digest"} <= entry.keys()
            }
        return self._known

    async def _write(self, known: dict[str, Reference]) -> None:
        self._known = known
        if self._path is not None:
            shape = {reference: model._asdict() for reference, model in known.items()}
            await in_thread(private_folder, self._path.parent)
            await in_thread(write_json, self._path, shape, self._path.parent)
