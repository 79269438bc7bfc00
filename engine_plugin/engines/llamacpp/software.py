"""Finds, installs and upgrades the software of llama.cpp.

`engine.backend: auto` selects the first of: a llama-server that plugin.yaml names or that is on PATH; the software
that InstallEngine installed in the data directory, xllamacpp or a release of llama.cpp; xllamacpp beside this package
(the extra `llamacpp`). GGUF headers are read with the package `gguf`, which all but the first include.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from engine_plugin.engines.llamacpp.options import LlamaCppOptions
from engine_plugin.engines.llamacpp.releases import find_server, release_archives
from engine_plugin.install import software
from engine_plugin.install.releases import select_archives
from engine_plugin.install.software import (
    LocalSoftware,
    distribution_version,
    locate_program,
    pinned_versions,
    requested_backend,
)
from engine_plugin.install.versions import InstallSteps
from engine_plugin.process import python
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from engine_plugin.engines.base import Progress
    from engine_plugin.install.releases import Archive

__all__ = ["RUNNER", "InstallHooks", "LlamaCppBackend", "LlamaCppSoftware"]

RUNNER = "engine_plugin.engines.llamacpp.runner"
_NEEDED_BYTES = 400 * 1024 * 1024
_PYTHON = "python"
"""The directory of gguf in an installed release."""


@dataclass(frozen=True, slots=True)
class LlamaCppBackend:
    """One usable llama.cpp. `origin` describes its location in messages; `site` is its package directory."""

    kind: str
    version: str
    origin: str
    site: Path | None = None
    executable: str = ""
    folder: Path | None = None
    """The directory of the installed version that it needs."""


InstallHooks: TypeAlias = software.InstallHooks[LlamaCppBackend]


class LlamaCppSoftware(LocalSoftware[LlamaCppBackend, LlamaCppOptions]):
    """The software of llama.cpp in one data directory."""

    engine = "llamacpp"
    requirements = Path(__file__).with_name("requirements.txt")

    @property
    def wanted_version(self) -> str:
        """The version to install: one of xllamacpp, or the tag of a release of llama.cpp."""
        if self._options.version:
            return self._options.version
        version = pinned_versions(self.requirements)["xllamacpp"]
        return f"b{version.rpartition('.')[2]}" if self._wanted == "release" else version

    @property
    def _wanted(self) -> str:
        options = self._options
        return requested_backend(options.backend, {"llama-server": options.llama_server, "release": options.archives})

    def _missing_reason(self) -> str:
        if self._wanted == "llama-server":
            return f"no llama-server: {self._options.llama_server or 'none on PATH'}"
        return "llama.cpp is not installed"

    def _find(self) -> LlamaCppBackend | None:
        wanted = self._wanted
        if wanted in ("auto", "llama-server"):
            name = self._options.llama_server or "llama-server"
            executable = locate_program(name, self._environ)
            if executable:
                current, site = self._installation.current(), self._site()
                folder = current.folder if current is not None and site is not None else None
                return LlamaCppBackend("llama-server", "", f"llama-server at {executable}", site, executable, folder)
            if wanted == "llama-server":
                return None
        current = self._installation.current()
        if current is not None:
            backend = _installed(current.folder, current.facts)
            if wanted == "auto" or wanted == current.facts.get("kind"):
                return backend
        if wanted == "release":
            return None
        version = distribution_version(None, "xllamacpp")
        return LlamaCppBackend("xllamacpp", version, "xllamacpp beside engine-plugin") if version else None

    def _site(self) -> Path | None:
        """The directory of Python packages of the current version."""
        current = self._installation.current()
        return None if current is None else _installed(current.folder, current.facts).site

    def _missing_parts(self, backend: LlamaCppBackend) -> str:  # noqa: ARG002  # any backend can use any gguf
        site = self._site()
        if distribution_version(None, "gguf") or (site is not None and distribution_version([str(site)], "gguf")):
            return ""
        return "the Python package gguf is missing. Call InstallEngine"

    def _manual_advice(self) -> str:
        if self._wanted != "llama-server":
            return ""
        return "Install llama.cpp's llama-server yourself, or set engine.backend to xllamacpp or release"

    def helper(self, verb: str) -> tuple[list[str], dict[str, str]]:
        """argv and environment for the runner's `probe` and `inspect`."""
        return python.module_command(RUNNER, verb), python.module_environ(self._environ, self._site())

    async def probe(self, backend: LlamaCppBackend) -> dict[str, Any]:
        """Run the software once: {"version": …, "devices": [{"name", "type", …}]}. Raises EngineStartError."""
        server = backend.kind == "llama-server"
        argv = [backend.executable, "--version"] if server else python.module_command(RUNNER, "probe")
        out, err = await self._run(backend, argv, python.module_environ(self._environ, backend.site))
        if server:
            found = re.search(r"version:\s*(\S+)", (out + err).decode("utf-8", "replace"))
            return {"version": f"b{found.group(1)}" if found else "unknown", "devices": None}
        shape: dict[str, Any] = json.loads(out)
        return shape

    def _up_to_date(self) -> bool:
        backend = self._find()
        if backend is None:
            return False
        if self._wanted != "release":
            return backend.kind == "llama-server" or backend.version == self.wanted_version
        return self._has_wanted_release()

    async def _replace(self, progress: Progress, hooks: InstallHooks, is_done: Callable[[], bool]) -> bool:
        release = self._wanted == "release"
        archives = self._archives() if release else ()

        async def fill(folder: Path) -> None:
            if release:
                await self._fill_with_release(folder, archives, progress)
            else:
                await self._fill_with_packages(folder, progress)

        async def check(folder: Path) -> Mapping[str, str]:
            facts = {"kind": "xllamacpp"}
            if release:
                server = (await in_thread(find_server, folder)).relative_to(folder).as_posix()
                facts = {"kind": "release", "executable": server, "source": self._release_id(archives)}
            version = await self._installer.verified_version(
                "llama.cpp", _installed(folder, facts), self.probe, hooks
            )
            return {**facts, "version": version}

        return await self._installer.replace(InstallSteps(fill, check, hooks.adopt, is_done), progress)

    def _archives(self) -> tuple[Archive, ...]:
        options = self._options
        known = options.archives or release_archives(self.wanted_version, options.mirror, options.checksums)
        return select_archives(known, options.accelerator)

    async def _fill_with_release(self, folder: Path, archives: tuple[Archive, ...], progress: Progress) -> None:
        await self._installer.unpack(archives, folder / "llama.cpp", progress)
        if not distribution_version(None, "gguf"):
            await self._installer.install_packages(folder / _PYTHON, progress, without=("xllamacpp",))

    async def _fill_with_packages(self, folder: Path, progress: Progress) -> None:
        """Install the pinned requirements by hash, or the version that plugin.yaml sets."""
        await self._installer.require_room(folder, _NEEDED_BYTES, "xllamacpp")
        progress(f"installing xllamacpp {self.wanted_version} into {self.folder}")
        if self._options.version:
            names = [f"xllamacpp=={self._options.version}", f"gguf=={pinned_versions(self.requirements)['gguf']}"]
            await self._installer.pip_install(folder, names, progress)
        else:
            await self._installer.install_packages(folder, progress)


def _installed(folder: Path, facts: Mapping[str, str]) -> LlamaCppBackend:
    """The backend in the directory of an installed version."""
    version = facts.get("version", "")
    if facts.get("kind") == "release":
        site = folder / _PYTHON
        executable = str(folder / facts.get("executable", "llama-server"))
        origin = f"llama-server in {folder}"
        return LlamaCppBackend("llama-server", version, origin, site if site.is_dir() else None, executable, folder)
    version = version or distribution_version([str(folder)], "xllamacpp")
    return LlamaCppBackend("xllamacpp", version, f"xllamacpp in {folder}", folder, folder=folder)
