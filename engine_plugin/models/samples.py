"""Tiny models that come inside the package, so that a fresh installation can serve at once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import engine_plugin
from engine_plugin.errors import EnginePluginError
from engine_plugin.models.info import ModelDetails, StoredModel
from engine_plugin.models.records import details_from_json
from engine_plugin.system.files import read_json

__all__ = ["Sample", "Samples", "bundled_samples"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One entry of a samples.json. `sha256` is 64 hex digits, `path` the file inside the package.

    `aliases` are names that it had before; calls may still use them.
    """

    name: str
    path: Path
    kind: str
    sha256: str
    size: int
    details: ModelDetails
    aliases: tuple[str, ...] = ()

    def info(self) -> StoredModel:
        """The sample as a model of the store."""
        return StoredModel(
            name=self.name,
            path=self.path,
            kind=self.kind,
            size=self.size,
            digest=f"sha256:{self.sha256}",
            modified_at=datetime.fromtimestamp(self.path.stat().st_mtime, UTC),
            bundled=True,
            details=self.details,
            references=self.aliases,
        )


class Samples:
    """The samples of one folder, in the order of its samples.json: the first of a kind is its default."""

    def __init__(self, folder: Path) -> None:
        """Read `folder/samples.json`. Raises EnginePluginError for a broken installation."""
        index = read_json(folder / "samples.json")
        if index is None:
            raise EnginePluginError(f"{folder / 'samples.json'} cannot be read: reinstall this package.")
        self._by_name = {
            entry["name"]: Sample(
                name=entry["name"],
                path=folder / entry["file"],
                kind=entry["kind"],
                sha256=entry["sha256"],
                size=entry["size"],
                details=details_from_json(entry["details"]),
                aliases=tuple(entry.get("aliases", ())),
            )
            for entry in index["samples"]
        }
        self._by_alias = {alias: sample for sample in self._by_name.values() for alias in sample.aliases}

    @property
    def names(self) -> list[str]:
        """The samples' names, in order."""
        return list(self._by_name)

    def get(self, name: str) -> Sample | None:
        """The sample of that name, present or former."""
        return self._by_name.get(name) or self._by_alias.get(name)

    def default_for(self, kind: str) -> str:
        """The name of the first sample of a kind, or ""."""
        return next((name for name, sample in self._by_name.items() if sample.kind == kind), "")


def bundled_samples(folder: str = "gguf") -> Samples:
    """The samples of one format in this package. Called by engines, once."""
    return Samples(Path(engine_plugin.__file__).parent / "samples" / folder)
