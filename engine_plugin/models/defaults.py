"""The user's default model of each service, kept in the plugin's data directory.

    <data_dir>/default-models-<engine>.json      {"chat": "qwen3", "generate": "qwen3"}

`engine-plugin models use` writes the file, the plugin reads it: a change counts for the next call, without a restart.
plugin.yaml belongs to the plugin's author and is replaced with it; this file belongs to the user.
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
    """The defaults of one engine in a data directory. `of` is for the event loop, the other methods block."""

    def __init__(self, data_dir: Path, engine: str) -> None:
        self.path = data_dir / f"default-models-{engine}.json"
        self._seen: tuple[int, int, int] | None = None
        self._models: Mapping[str, str] = {}

    async def of(self, service: str) -> str:
        """The user's model for a service, "" without one. Costs one stat while the file stays the same.

        Raises PreconditionError for a file that cannot be read.
        """
        state = self._state()
        if state != self._seen:
            self._models = await in_thread(self.read)
            self._seen = state
        return self._models.get(service, "")

    def read(self) -> dict[str, str]:
        """Each service with its model. Raises PreconditionError for a file that cannot be read."""
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
        from filelock import FileLock  # only writers need it, and the plugin just reads

        private_folder(self.path.parent)
        with FileLock(self.path.with_suffix(".lock"), mode=0o600):
            models = {service: model for service, model in {**self.read(), **changes}.items() if model}
            if models:
                write_json(self.path, models, self.path.parent)
            else:
                self.path.unlink(missing_ok=True)

    def _state(self) -> tuple[int, int, int] | None:
        """What changes whenever the file does; None without a file."""
        try:
            info = self.path.stat()
        except FileNotFoundError:
            return None
        return info.st_mtime_ns, info.st_size, info.st_ino
