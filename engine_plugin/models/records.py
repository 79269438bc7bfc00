"""The `.json` beside each model: what is known about the file, valid while its size and mtime stay."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine_plugin.models.info import KINDS, ModelDetails, StoredModel

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.models.layout import Extent

__all__ = ["Record", "details_from_json"]


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a list; none of anything else."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def details_from_json(value: Mapping[str, Any]) -> ModelDetails:
    """ModelDetails as `asdict` wrote them; what is missing is empty."""
    return ModelDetails(
        format=str(value.get("format", "")),
        family=str(value.get("family", "")),
        families=tuple(str(family) for family in value.get("families", ())),
        parameter_size=str(value.get("parameter_size", "")),
        quantization_level=str(value.get("quantization_level", "")),
        extra=dict(value.get("extra", {})),
    )


@dataclass(frozen=True, slots=True)
class Record:
    """One model's metadata. `source` and `validator` (ETag and the like) are "" for a file laid in by hand.

    `kind_given` says that a person chose the kind, so that inspecting the file again does not undo it. `references`
    are what pulls of this model asked for where that is not its name (`hf:owner/name`, a path), without secrets.
    """

    name: str
    kind: str
    size: int
    mtime_ns: int
    digest: str
    source: str = ""
    validator: str = ""
    pulled_at: str = ""
    kind_given: bool = False
    references: tuple[str, ...] = ()
    details: ModelDetails = field(default_factory=ModelDetails)

    def describes(self, extent: Extent) -> bool:
        """Whether this was written about what has this extent."""
        return (self.size, self.mtime_ns) == (extent.size, extent.mtime_ns)

    def to_json(self) -> dict[str, Any]:
        """The content of the `.json` file."""
        return asdict(self)

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any] | None) -> Record | None:
        """The record that `to_json` wrote, or None for anything else: the file is then inspected anew."""
        if value is None:
            return None
        try:
            record = cls(
                name=name,
                kind=str(value["kind"]),
                size=int(value["size"]),
                mtime_ns=int(value["mtime_ns"]),
                digest=str(value["digest"]),
                source=str(value.get("source", "")),
                validator=str(value.get("validator", "")),
                pulled_at=str(value.get("pulled_at", "")),
                kind_given=value.get("kind_given") is True,
                references=_texts(value.get("references")),
                details=details_from_json(value["details"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return record if record.kind in KINDS and record.digest.startswith("sha256:") else None

    def info(self, path: Path) -> StoredModel:
        """The model at `path` that this record describes."""
        return StoredModel(
            name=self.name,
            path=path,
            kind=self.kind,
            size=self.size,
            digest=self.digest,
            modified_at=datetime.fromtimestamp(self.mtime_ns / 1e9, UTC),
            bundled=False,
            details=self.details,
            references=self.references,
        )
