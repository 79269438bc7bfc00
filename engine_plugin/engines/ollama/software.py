"""The Ollama software: which one is on this machine for a server of our own, installing it, upgrading it.

Places, in the order they are looked at: the ollama that plugin.yaml names (`engine.ollama`); what InstallEngine put
below the data directory; with `server: manage`, the one on PATH. An Ollama that somebody runs is no matter of this
module: `attachment` finds it, and it is neither installed nor upgraded here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from engine_plugin.engines.ollama.releases import RELEASE, find_ollama, release_archives
from engine_plugin.install import software
from engine_plugin.install.releases import choose
from engine_plugin.install.software import LocalSoftware, on_this_machine
from engine_plugin.install.versions import Steps
from engine_plugin.process.environ import child_environ
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.install.releases import Archive

__all__ = ["Backend", "Moves", "Software"]

_NO_PACKAGES = Path(os.devnull)
"""Ollama needs no Python package."""

_UNPACKED = "ollama"
_NOWHERE = "127.0.0.1:1"
"""Where no server is: `ollama --version` asks one at OLLAMA_HOST, and would tell of that."""

_VERSION = re.compile(r"(?:client version|ollama version) is v?(\S+)")


@dataclass(frozen=True, slots=True)
class Backend:
    """One ollama program: its version ("" until it has been asked), and where it is in words."""

    version: str
    origin: str
    executable: str
    folder: Path | None = None
    """The directory that an installation gave it; None for one that somebody else put on this machine."""

    site: ClassVar[Path | None] = None
    """It needs no Python packages."""


Moves: TypeAlias = software.Moves[Backend]


class Software(LocalSoftware[Backend]):
    """Ollama's program for one data directory."""

    engine = "ollama"

    def __init__(self, options: OllamaOptions, data_dir: Path, environ: Mapping[str, str]) -> None:
        """No I/O."""
        super().__init__(
            data_dir,
            _NO_PACKAGES,
            environ,
            offline=options.offline,
            verify=options.verify,
            own_archives=bool(options.archives),
        )
        self._options = options

    @property
    def wanted_version(self) -> str:
        """The release that an installation gives."""
        return self._options.version.removeprefix("v") or RELEASE

    def _missing(self) -> str:
        if self._options.ollama:
            return f"no ollama: {self._options.ollama}"
        return "Ollama is not installed"

    def _find(self) -> Backend | None:
        if self._options.ollama:
            return self._theirs(self._options.ollama)
        current = self._installation.current()
        if current is not None:
            return _installed(current.folder, current.facts)
        return self._theirs("ollama") if self._options.server == "manage" else None

    def _theirs(self, name: str) -> Backend | None:
        """The program that somebody else put on this machine."""
        executable = on_this_machine(name, self._environ)
        return Backend("", f"ollama at {executable}", executable) if executable else None

    def _lacks(self, backend: Backend) -> str:  # noqa: ARG002  # the program is all there is
        return ""

    def _not_ours(self) -> str:
        if not self._options.ollama:
            return ""
        return "Correct engine.ollama, or leave it out: then InstallEngine brings one"

    async def probe(self, backend: Backend) -> dict[str, Any]:
        """Run the program once: {"version": …, "devices": None}: it tells of those when it serves.

        Raises EngineStartError.
        """
        environ = {**child_environ(self._environ), "OLLAMA_HOST": _NOWHERE}
        out, err = await self._run(backend, [backend.executable, "--version"], environ)
        found = _VERSION.search((out + err).decode("utf-8", "replace"))
        return {"version": found[1] if found else "unknown", "devices": None}

    def _up_to_date(self) -> bool:
        backend = self._find()
        if backend is None:
            return False
        if backend.folder is None:
            return True  # whoever put it there upgrades it
        return self._has_wanted_release()

    async def _replace(self, progress: Progress, moves: Moves, needless: Callable[[], bool]) -> bool:
        archives = await in_thread(self._archives)

        async def fill(folder: Path) -> None:
            await self._workshop.unpack(archives, folder / _UNPACKED, progress)

        async def check(folder: Path) -> Mapping[str, str]:
            program = (await in_thread(find_ollama, folder)).relative_to(folder).as_posix()
            facts = {"kind": "ollama", "executable": program, "source": self._source_of(archives)}
            version = await self._workshop.proved("Ollama", _installed(folder, facts), self.probe, moves)
            return {**facts, "version": version}

        return await self._workshop.replace(Steps(fill, check, moves.adopt, needless), progress)

    def _archives(self) -> tuple[Archive, ...]:
        options = self._options
        known = options.archives or release_archives(self.wanted_version, options.mirror, options.checksums)
        return choose(known, options.accelerator)

    def _source_of(self, archives: Sequence[Archive]) -> str:
        """Every release's files have the same names, so that these alone do not tell one from another."""
        source = super()._source_of(archives)
        return source if self._options.archives else f"{self.wanted_version} {source}"


def _installed(folder: Path, facts: Mapping[str, str]) -> Backend:
    """What an installation's directory holds."""
    program = folder / facts.get("executable", f"{_UNPACKED}/bin/ollama")
    return Backend(facts.get("version", ""), f"Ollama in {folder}", str(program), folder)
