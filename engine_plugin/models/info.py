"""What the plugin knows about models: kinds, details, capabilities, and the sample models of the package."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_plugin
from engine_plugin.errors import EnginePluginError, InvalidRequestError
from engine_plugin.system.files import read_json

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = [
    "FEATURES",
    "FEATURE_OF_KIND",
    "KINDS",
    "KIND_OF_SERVICE",
    "Inspection",
    "Loaded",
    "ModelCapabilities",
    "ModelDescription",
    "ModelInfo",
    "Samples",
    "StoredModel",
    "bundled_samples",
    "can_serve",
    "details_from_json",
    "kind_of_type",
]

KINDS = ("chat", "embed", "rerank", "text-to-image", "speech-to-text", "text-to-speech")
"""The kinds of models. A chat model also serves generate, a speech-to-text model also live transcription."""

KIND_OF_SERVICE = {"generate": "chat", "speech-to-text-ws": "speech-to-text"} | {kind: kind for kind in KINDS}
"""The kind of model that each service needs."""

FEATURES = (
    "completion",
    "insert",
    "tools",
    "thinking",
    "vision",
    "audio",
    "embedding",
    "rerank",
    "image",
    "transcription",
    "speech",
)
"""The features in `ModelCapabilities`: `insert` is to fill gaps in a text, `audio` sound as input of a chat, `image`
to generate pictures, `speech` to generate sound."""

FEATURE_OF_KIND = {
    "chat": "completion",
    "embed": "embedding",
    "rerank": "rerank",
    "text-to-image": "image",
    "speech-to-text": "transcription",
    "text-to-speech": "speech",
}
"""The feature that every model of a kind has."""


def can_serve(service: str, kind: str, features: Collection[str]) -> bool:
    """Whether a model of that kind and with these features may answer a service.

    The features count besides the kind: with some engines a chat model transcribes.
    """
    wanted = KIND_OF_SERVICE.get(service, "")
    return kind == wanted or FEATURE_OF_KIND.get(wanted) in features


def kind_of_type(model_type: str) -> str:
    """The kind for a request's `model_type` (a service's name), "" for "". Raises InvalidRequestError."""
    if model_type and model_type not in KIND_OF_SERVICE:
        known = ", ".join(KIND_OF_SERVICE)
        raise InvalidRequestError.at("model_type", f"{model_type[:64]!r} is not one of {known}.")
    return KIND_OF_SERVICE.get(model_type, "")


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The `details` of a model in ListModels; `extra` has further JSON values that the engine read."""

    format: str = ""
    family: str = ""
    families: tuple[str, ...] = ()
    parameter_size: str = ""
    quantization_level: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """The details as JSON. A key of `extra` does not replace one of the five fields of the wire."""
        shape = asdict(self)
        return {**shape.pop("extra"), **shape, "families": list(self.families)}


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of an inspection of a model: its kind (one of KINDS) and its details."""

    kind: str
    details: ModelDescription = field(default_factory=ModelDescription)


@dataclass(frozen=True, slots=True)
class ModelCapabilities:
    """The features of a model (words of FEATURES) and its context length in tokens (0: unknown).

    `context_source` is where the context length comes from: configuration, engine, file, family, estimate, or "".
    """

    features: tuple[str, ...] = ()
    context_length: int = 0
    context_source: str = ""

    def to_wire(self) -> dict[str, Any]:
        """The keys in `details`, without those of unknown values."""
        shape: dict[str, Any] = {"capabilities": list(self.features)} if self.features else {}
        if self.context_length:
            shape |= {"context_length": self.context_length, "context_source": self.context_source}
        return shape


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory: its bytes, and those of them on an accelerator (0: unknown or none).

    `idle` is the seconds since it was last used, `expires_at` (aware) when it leaves by itself; None: not known, or
    never. `context_length` is what it was loaded with (tokens; 0: not known).
    """

    memory: int = 0
    accelerator_memory: int = 0
    idle: float | None = None
    expires_at: datetime | None = None
    context_length: int = 0

    def to_wire(self) -> dict[str, Any]:
        """The key `loaded` of an entry of GetRunningModels."""
        shape: dict[str, Any] = {"memory": self.memory, "accelerator_memory": self.accelerator_memory}
        if self.idle is not None:
            shape["idle_s"] = round(self.idle, 1)
        if self.expires_at is not None:
            shape["expires_at"] = self.expires_at.isoformat()
        if self.context_length:
            shape["context_length"] = self.context_length
        return shape


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that a call may name.

    `digest` is `sha256:…`, or "" if unknown, such as for a big file laid into the store by hand while it is
    still being read. `modified_at` is aware, `size` is in bytes; a `bundled` model is a sample inside the package.
    """

    name: str
    kind: str
    size: int
    digest: str
    modified_at: datetime
    bundled: bool
    details: ModelDescription
    capabilities: ModelCapabilities = ModelCapabilities()
    loaded: Loaded | None = None
    references: tuple[str, ...] = ()
    """Other names for calls: the references of its pulls, the former names of a sample."""

    def to_wire(self) -> dict[str, Any]:
        """One entry of ListModelsResponse."""
        shape = {
            "name": self.name,
            "model": self.name,
            "modified_at": self.modified_at.isoformat(),
            "size": self.size,
            "digest": self.digest,
            "details": {**self.details.to_wire(), **self.capabilities.to_wire()},
            "kind": self.kind,
            "bundled": self.bundled,
        }
        if self.references:
            shape["references"] = list(self.references)
        return shape if self.loaded is None else {**shape, "loaded": self.loaded.to_wire()}


@dataclass(frozen=True, slots=True)
class StoredModel(ModelInfo):
    """A model in a store: `path` is its file or folder."""

    path: Path = field(kw_only=True)


def details_from_json(value: Mapping[str, Any]) -> ModelDescription:
    """Read ModelDescription that `asdict` wrote; missing fields are empty."""
    return ModelDescription(
        format=str(value.get("format", "")),
        family=str(value.get("family", "")),
        families=tuple(str(family) for family in value.get("families", ())),
        parameter_size=str(value.get("parameter_size", "")),
        quantization_level=str(value.get("quantization_level", "")),
        extra=dict(value.get("extra", {})),
    )


class Samples:
    """The sample models of one folder, in the order of its samples.json: the first of a kind is its default.

    A sample whose file is missing makes the calls fail that return it as a model, by EnginePluginError.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Read `folder/samples.json`; no samples without one. Raises EnginePluginError for a broken installation."""
        self._by_name: dict[str, StoredModel] = {}
        if folder is None:
            return
        index = read_json(folder / "samples.json")
        if index is None:
            raise _broken(folder / "samples.json")
        for entry in index["samples"]:
            self._by_name[entry["name"]] = StoredModel(
                name=entry["name"],
                path=folder / entry["file"],
                kind=entry["kind"],
                size=entry["size"],
                digest=f"sha256:{entry['sha256']}",
                modified_at=datetime.fromtimestamp(0, UTC),  # `_installed` replaces it
                bundled=True,
                details=details_from_json(entry["details"]),
                references=tuple(entry.get("aliases", ())),
            )

    def besides(self, names: Collection[str]) -> list[StoredModel]:
        """The samples that have other names than these, in order."""
        return [_installed(sample) for name, sample in self._by_name.items() if name not in names]

    @property
    def names(self) -> list[str]:
        """The samples' names, in order."""
        return list(self._by_name)

    @property
    def digests(self) -> set[str]:
        """The samples' digests, `sha256:…`."""
        return {sample.digest for sample in self._by_name.values()}

    def name_of(self, name: str) -> str:
        """The name of the sample with this name or former name, or ""."""
        if name in self._by_name:
            return name
        return next((sample.name for sample in self._by_name.values() if name in sample.references), "")

    def get(self, name: str) -> StoredModel | None:
        """The sample with this name or former name."""
        sample = self._by_name.get(self.name_of(name))
        return None if sample is None else _installed(sample)

    def default_for(self, kind: str) -> str:
        """The name of the first sample of a kind, or ""."""
        return next((sample.name for sample in self._by_name.values() if sample.kind == kind), "")


def _installed(sample: StoredModel) -> StoredModel:
    """A sample with the time of its file or folder."""
    try:
        modified = sample.path.stat().st_mtime
    except OSError as error:
        raise _broken(sample.path) from error
    return replace(sample, modified_at=datetime.fromtimestamp(modified, UTC))


def _broken(path: Path) -> EnginePluginError:
    return EnginePluginError(f"{path} cannot be read: reinstall this package.")


def bundled_samples(folder: str = "gguf") -> Samples:
    """The sample models of one format. Called once by an engine."""
    return Samples(Path(engine_plugin.__file__).parent / "samples" / folder)
