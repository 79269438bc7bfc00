"""The software of the managed server: finding, installing and upgrading it.

The program is the first of: `engine.ollama` of plugin.yaml; the version that InstallEngine put below the data
directory; with `server: manage`, the ollama on PATH. The software of an attached server is never changed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.releases import RELEASE, find_ollama, release_archives
from engine_plugin.install import software
from engine_plugin.install.releases import select_archives
from engine_plugin.install.software import LocalSoftware, locate_program
from engine_plugin.install.versions import InstallSteps
from engine_plugin.process.environ import child_environ
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.install.releases import Archive

__all__ = ["OllamaProgram", "OllamaSoftware"]

_UNPACKED = "ollama"
_NO_SERVER = "127.0.0.1:1"
"""An address without a server: `ollama --version` would report the version of the server at OLLAMA_HOST."""

_VERSION = re.compile(r"(?:client version|ollama version) is v?(\S+)")


@dataclass(frozen=True, slots=True)
class OllamaProgram:
    """One ollama program. `version` is "" while unknown; `origin` describes the program in messages."""

    version: str
    origin: str
    executable: str
    folder: Path | None = None
    """The directory of the installed version; None for a program that the plugin did not install."""

    site: ClassVar[Path | None] = None
    """Ollama has no Python packages."""


InstallHooks: TypeAlias = software.InstallHooks[OllamaProgram]


class OllamaSoftware(LocalSoftware[OllamaProgram, OllamaOptions]):
    """Finds, installs and probes the ollama program of one data directory. Owned by `ManagedServer`."""

    engine = "ollama"
    requirements = Path(os.devnull)  # Ollama needs no Python packages

    @property
    def wanted_version(self) -> str:
        """The release that InstallEngine installs."""
        return self._options.version.removeprefix("v") or RELEASE

    def _missing_reason(self) -> str:
        if self._options.ollama:
            return f"engine.ollama: {self._options.ollama} is not a program"
        return "Ollama is not installed"

    def _find(self) -> OllamaProgram | None:
        if self._options.ollama:
            return self._foreign(self._options.ollama)
        current = self._installation.current()
        if current is not None:
            return _installed(current.folder, current.facts)
        return self._foreign("ollama") if self._options.server == "manage" else None

    def _foreign(self, name: str) -> OllamaProgram | None:
        """A program that the plugin did not install; None if there is none of that name or path."""
        executable = locate_program(name, self._environ)
        return OllamaProgram("", f"ollama at {executable}", executable) if executable else None

    def _missing_parts(self, backend: OllamaProgram) -> str:  # noqa: ARG002  # it has no packages
        return ""

    def _manual_advice(self) -> str:
        if not self._options.ollama:
            return ""
        return "Correct engine.ollama, or remove it and call InstallEngine"

    async def probe(self, backend: OllamaProgram) -> dict[str, Any]:
        """Run `ollama --version`. The result has no devices, which only a started server reports.

        Raises EngineStartError.
        """
        environ = {**child_environ(self._environ), "OLLAMA_HOST": _NO_SERVER}
        out, err = await self._run(backend, [backend.executable, "--version"], environ)
        found = _VERSION.search((out + err).decode("utf-8", "replace"))
        return {"version": found[1] if found else "unknown", "devices": None}

    def _up_to_date(self) -> bool:
        program = self._find()
        if program is None:
            return False
        if program.folder is None:
            return True  # upgraded by its own installer
        return self._has_wanted_release()

    async def _replace(self, progress: Progress, hooks: InstallHooks, is_done: Callable[[], bool]) -> bool:
        archives = await in_thread(self._archives)

        async def fill(folder: Path) -> None:
            await self._installer.unpack(archives, folder / _UNPACKED, progress)

        async def check(folder: Path) -> Mapping[str, str]:
            program = (await in_thread(find_ollama, folder)).relative_to(folder).as_posix()
            facts = {"kind": "ollama", "executable": program, "source": self._release_id(archives)}
            version = await self._installer.verified_version("Ollama", _installed(folder, facts), self.probe, hooks)
            return {**facts, "version": version}

        return await self._installer.replace(InstallSteps(fill, check, hooks.adopt, is_done), progress)

    def _archives(self) -> tuple[Archive, ...]:
        options = self._options
        known = options.archives or release_archives(self.wanted_version, options.mirror, options.checksums)
        return select_archives(known, options.accelerator)

    def _release_id(self, archives: Sequence[Archive]) -> str:
        """The version and the archives, whose names are the same for every release."""
        source = super()._release_id(archives)
        return source if self._options.archives else f"{self.wanted_version} {source}"


def _installed(folder: Path, facts: Mapping[str, str]) -> OllamaProgram:
    """The program in the directory of an installed version."""
    program = folder / facts.get("executable", f"{_UNPACKED}/bin/ollama")
    return OllamaProgram(facts.get("version", ""), f"Ollama in {folder}", str(program), folder)
