"""The models of a contract server, small files below OLLAMA_MODELS, and those that it can pull."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from .names import ModelName

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MODELS", "REGISTRY", "Library", "Model", "digest_of", "model_of"]


@dataclass(frozen=True, slots=True)
class Model:
    """A model. `layers` are sizes in bytes, `context` and `embedding` are lengths."""

    name: str
    capabilities: tuple[str, ...] = ("completion",)
    family: str = "llama"
    parameters: str = "135M"
    quantization: str = "Q4_0"
    context: int = 8192
    embedding: int = 576
    layers: tuple[int, ...] = (91_000_000, 1_200, 560)
    settings: str = ""
    """The lines of `parameters` in `show`."""
    remote: str = ""
    """The cloud model behind this one."""
    modified_at: str = ""
    marks: tuple[str, ...] = ()
    """Its faults; see `faults`."""

    @property
    def digest(self) -> str:
        """The digest of its manifest, in hex; a copy has the same."""
        facts = asdict(self) | {"name": "", "modified_at": ""}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def size(self) -> int:
        """The total size in bytes."""
        return sum(self.layers)

    def blobs(self) -> list[tuple[str, int]]:
        """The digests and sizes of its layers."""
        return [(digest_of(f"{self.name.partition(':')[0]} {index}"), size) for index, size in enumerate(self.layers)]

    def details(self) -> dict[str, Any]:
        """The `details` of `tags`, `ps` and `show`; only `tags` has lengths."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": self.parameters,
            "quantization_level": self.quantization,
        }


_THINKS = ("completion", "tools", "thinking")
_CALLS = ("completion", "tools", "insert")
_SEES = ("completion", "vision")

MODELS = (
    Model("tiny-chat:latest", settings='stop                           "<|im_end|>"'),
    Model("think:8b", _THINKS, "qwen3", "8.2B", "Q4_K_M", 40960, 4096, (5_200_000_000, 490)),
    Model("tools:7b", _CALLS, "qwen2", "7.6B", "Q4_K_M", 32768, 3584, (4_700_000_000, 487)),
    Model("vision:7b", _SEES, "llama", "7B", "Q4_0", 4096, 4096, (4_100_000_000, 624_000_000, 566)),
    Model("embed:latest", ("embedding",), "nomic-bert", "137M", "F16", 2048, 768, (274_000_000, 420)),
    Model("audio:latest", ("completion", "audio"), "gemma3n", "4.5B", "Q4_K_M", 32768, 2048, (5_600_000_000, 490)),
)
"""The initial models of a server."""

REGISTRY = (
    *MODELS,
    Model("fresh:latest", layers=(40_000_000, 8_000_000, 1_500, 480)),
    Model("fresh:1b", parameters="1.2B", layers=(60_000_000, 1_500, 480)),
    Model("smollm2:135m", layers=(270_000_000, 1_200, 560)),
    Model("llama3.2:1b", ("completion", "tools"), "llama", "1.2B", "Q8_0", 131072, 2048, (1_300_000_000, 1_400, 485)),
    Model("qwen3:0.6b", _THINKS, "qwen3", "751.63M", "Q4_K_M", 40960, 1024, (522_000_000, 490)),
    Model("someone/special:v2", layers=(30_000_000, 480)),
)
"""The models that `pull` finds. Names that begin with `fault-` are found, too, with their fault."""


def digest_of(text: str) -> str:
    """The digest of a text, with `sha256:`."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


class Library:
    """The models below one folder: small files, read and written in place."""

    def __init__(self, folder: Path, first: tuple[Model, ...]) -> None:
        """`first` are the models of a new folder."""
        self._manifests = folder / "manifests"
        self._blobs = folder / "blobs"
        new = not self._manifests.exists()
        self._manifests.mkdir(parents=True, exist_ok=True)
        self._blobs.mkdir(parents=True, exist_ok=True)
        if new:
            for model in first:
                self.add(model)

    def all(self) -> list[Model]:
        """All models, newest first."""
        found = [_read(path) for path in self._manifests.rglob("[!.]*") if path.is_file()]
        return sorted(found, key=lambda model: (model.modified_at, model.name), reverse=True)

    def find(self, name: ModelName) -> Model | None:
        """A model by its name, in any case."""
        path = self._path(name)
        return _read(path) if path.is_file() else None

    def add(self, model: Model) -> None:
        """Write a model, modified now unless it has a time."""
        name = ModelName.parse(model.name)
        assert name is not None, model.name
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "467Z"
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.new")
        scratch.write_text(
            json.dumps(asdict(replace(model, name=name.shortest, modified_at=model.modified_at or now)))
        )
        scratch.replace(path)

    def remove(self, name: ModelName) -> bool:
        """Remove a model; returns whether it existed."""
        path = self._path(name)
        if not path.is_file():
            return False
        path.unlink()
        return True

    def blob(self, digest: str) -> Path:
        """The path of the blob with this digest."""
        return self._blobs / digest.replace(":", "-")

    def _path(self, name: ModelName) -> Path:
        parts = [name.host.replace(":", os.sep + "port-"), name.namespace, name.model, name.tag]
        return self._manifests.joinpath(*(part.lower() for part in parts))


def _read(path: Path) -> Model:
    return model_of(json.loads(path.read_text()))


def model_of(shape: dict[str, Any]) -> Model:
    """A model from its fields in JSON."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}
    return Model(**fields)
