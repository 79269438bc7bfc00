"""The software of the managed server: finding, installing and upgrading it.

The program is the first of: `engine.ollama` of plugin.yaml; the version that InstallEngine put below the data
directory; with `server: manage`, the ollama on PATH. The software of an attached server is never changed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.releases import RELEASE, release_archives
from engine_plugin.install.releases import select_archives
from engine_plugin.install.software import Backend, LocalSoftware, locate_program
from engine_plugin.process.environ import child_environ

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.install.releases import Archive

__all__ = ["OllamaSoftware"]

_UNPACKED = "ollama"
_NO_SERVER = "127.0.0.1:1"
"""An address without a server: `ollama --version` would report the version of the server at OLLAMA_HOST."""

_VERSION = re.compile(r"(?:client version|ollama version) is v?(\S+)")


class OllamaSoftware(LocalSoftware[OllamaOptions]):
    """Finds, installs and probes the ollama program of one data directory. Owned by `ManagedServer`."""

    engine = "ollama"
    title = "Ollama"
    program = "ollama"
    requirements = Path(os.devnull)  # Ollama needs no Python packages

    @property
    def wanted_version(self) -> str:
        """The release that InstallEngine installs."""
        return self._options.version.removeprefix("v") or RELEASE

    def _missing(self) -> tuple[str, str]:
        if name := self._options.ollama:
            return (
                f"engine.ollama: {name} is not a program",
                "Correct engine.ollama, or remove it and call InstallEngine",
            )
        return "Ollama is not installed", ""

    def _candidates(self) -> Iterator[Backend]:
        options = self._options
        if not options.ollama and (current := self._installation.current()) is not None:
            yield self._installed(current.folder, current.facts)
        if options.ollama or options.server == "manage":
            executable = locate_program(options.ollama or "ollama", self._environ)
            if executable:  # not installed by this plugin
                yield Backend("ollama", "", f"ollama at {executable}", executable=executable)

    async def probe(self, backend: Backend) -> dict[str, Any]:
        """Run `ollama --version`. The result has no devices, which only a started server reports.

        Raises EngineStartError.
        """
        environ = {**child_environ(self._environ), "OLLAMA_HOST": _NO_SERVER}
        out, err = await self._run(backend, [backend.executable, "--version"], environ)
        found = _VERSION.search((out + err).decode("utf-8", "replace"))
        return {"version": found[1] if found else "unknown", "devices": None}

    def _up_to_date(self, backend: Backend) -> bool:
        return backend.folder is None or self._has_wanted_release()  # its own installer upgrades another one

    def _kind(self) -> str:
        return "ollama"

    async def _fill(self, folder: Path, archives: tuple[Archive, ...], progress: Progress) -> None:
        await self._unpack(archives, folder / _UNPACKED, progress)

    def _installed(self, folder: Path, facts: Mapping[str, str]) -> Backend:
        program = str(folder / facts.get("executable", f"{_UNPACKED}/bin/ollama"))
        version = facts.get("version", "")
        return Backend("ollama", version, f"Ollama in {folder}", executable=program, folder=folder)

    def _archives(self) -> tuple[Archive, ...]:
        options = self._options
        known = options.archives or release_archives(self.wanted_version, options.mirror, options.checksums)
        return select_archives(known, options.accelerator)

    def _release_id(self, archives: Sequence[Archive]) -> str:
        """The version and the archives, whose names are the same for every release."""
        source = super()._release_id(archives)
        return source if self._options.archives else f"{self.wanted_version} {source}"
