"""How models lie below a store's root: where a model's bytes and its record are, and what its names may be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.models.names import is_model_name, other_case
from engine_plugin.system.files import sha256_of, sync_folder

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Extent", "FileLayout", "Layout"]


@dataclass(frozen=True, slots=True)
class Extent:
    """What tells cheaply whether a model changed: its bytes, and when it was last touched (ns since the epoch)."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Extent:
        """A file's."""
        return cls(stat.st_size, stat.st_mtime_ns)


class Layout(ABC):
    """One way to keep models below a root. All but `digest` block, if only for some stats."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.partials = root / ".partial"

    @abstractmethod
    def is_name(self, name: object) -> bool:
        """Whether a model may be called so here."""

    @abstractmethod
    def path(self, name: str) -> Path:
        """Where the model of that (valid) name is, or would be."""

    @abstractmethod
    def record(self, name: str) -> Path:
        """Where its record is, or would be."""

    @abstractmethod
    def names(self) -> tuple[list[str], list[tuple[str, str]]]:
        """What lies below the root: names of models, sorted; and of what looks like one but may not be called so,
        with the reason."""

    @abstractmethod
    def extent(self, name: str) -> Extent | None:
        """The extent of the model of that (valid) name, None when there is none."""

    @abstractmethod
    async def digest(self, name: str) -> str:
        """`sha256:…` of the model. Raises OSError."""

    @abstractmethod
    def put(self, part: Path, name: str) -> None:
        """Move what is complete into its place, which may be taken. Raises OSError."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a model, or nothing. Raises OSError."""

    def forget(self, name: str) -> None:
        """Delete a record, or nothing. Raises OSError."""
        self.record(name).unlink(missing_ok=True)

    def clash(self, name: str, existing: Iterable[str]) -> str:
        """Why a model may not be called so beside those that exist, "" when it may."""
        other = other_case(name, existing)
        if not other:
            return ""
        return f"{name!r} differs only by case from {other!r}, which is present; use that name or another one."


class FileLayout(Layout):
    """Each model is one file, `<root>/<name><suffix>`, with its record beside it."""

    def __init__(self, root: Path, suffix: str) -> None:
        super().__init__(root)
        self.suffix = suffix

    def is_name(self, name: object) -> bool:
        """One plain segment."""
        return is_model_name(name)

    def path(self, name: str) -> Path:
        """The file."""
        return self.root / f"{name}{self.suffix}"

    def record(self, name: str) -> Path:
        """Beside the file."""
        return self.root / f"{name}.json"

    def names(self) -> tuple[list[str], list[tuple[str, str]]]:
        """By the files that end in the suffix."""
        try:
            entries = sorted(entry.name for entry in self.root.iterdir() if entry.is_file())
        except FileNotFoundError:
            return [], []
        stems = [entry.removesuffix(self.suffix) for entry in entries if entry.endswith(self.suffix)]
        bad = [(stem, "its name is no model name; rename the file") for stem in stems if not is_model_name(stem)]
        return [stem for stem in stems if is_model_name(stem)], bad

    def extent(self, name: str) -> Extent | None:
        """One stat."""
        try:
            return Extent.of(self.path(name).stat())
        except (FileNotFoundError, NotADirectoryError):
            return None

    async def digest(self, name: str) -> str:
        """Of the file's bytes."""
        return await sha256_of(self.path(name))

    def put(self, part: Path, name: str) -> None:
        """One rename."""
        part.replace(self.path(name))
        sync_folder(self.root)

    def remove(self, name: str) -> None:
        """One unlink."""
        self.path(name).unlink(missing_ok=True)
        sync_folder(self.root)
