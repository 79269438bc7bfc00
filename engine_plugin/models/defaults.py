"""The default models that the user has chosen for services, in the data directory of the plugin.

    <data_dir>/default-models-<engine>.json      {"chat": "qwen3", "generate": "qwen3"}

`engine-plugin models use` writes the file. The plugin reads it again when it changes. It is not in plugin.yaml, which
an upgrade of the plugin replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.errors import PreconditionError
from engine_plugin.system.files import in_thread, private_folder, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["DefaultModels"]


class DefaultModels:
    """The defaults of one engine. `of` is for the event loop; the other methods block."""

    def __init__(self, data_dir: Path, engine: str) -> None:
        self.path = data_dir / f"default-models-{engine}.json"
        self._seen: tuple[int, int, int] | None = None
        self._models: Mapping[str, str] = {}

    async def of(self, service: str) -> str:
        """The model that the user has chosen for a service, or "". Costs one stat while the file is unchanged.

        Raises PreconditionError for a damaged file.
        """
        state = self._state()
        if state != self._seen:
            self._models = await in_thread(self.read)
            self._seen = state
        return self._models.get(service, "")

    def read(self) -> dict[str, str]:
        """The model of each service. Raises PreconditionError for a damaged file."""
        if self._state() is None:
            return {}
        models = read_json(self.path)
        if models is None or not all(isinstance(model, str) for model in models.values()):
            raise PreconditionError(
                f"{self.path} is damaged: it must hold a JSON object of service names and model names. "
                "Correct or delete it"
            )
        return models

    def write(self, changes: Mapping[str, str]) -> None:
        """Set the model of each service in `changes`; an empty name removes it. Raises OSError, PreconditionError."""
        from filelock import FileLock  # imported late, since the plugin only reads

        private_folder(self.path.parent)
        with FileLock(self.path.with_suffix(".lock"), mode=0o600):
            models = {service: model for service, model in {**self.read(), **changes}.items() if model}
            if models:
                write_json(self.path, models, self.path.parent)
            else:
                self.path.unlink(missing_ok=True)

    def _state(self) -> tuple[int, int, int] | None:
        """A value that changes with the file; None without a file."""
        try:
            info = self.path.stat()
        except FileNotFoundError:
            return None
        return info.st_mtime_ns, info.st_size, info.st_ino
