"""Finds, installs and upgrades the software of llama.cpp.

`engine.backend: auto` selects the first of: a llama-server that plugin.yaml names or that is on PATH; the software
that InstallEngine installed in the data directory, xllamacpp or a release of llama.cpp; xllamacpp beside this package
(the extra `llamacpp`). GGUF headers are read with the package `gguf`, which all but the first include.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.llamacpp.options import LlamaCppOptions
from engine_plugin.install.releases import Archive, select_archives
from engine_plugin.install.software import (
    Backend,
    LocalSoftware,
    distribution_version,
    locate_program,
    pinned_versions,
    requested_backend,
)
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from engine_plugin.engines.base import Progress

__all__ = ["RUNNER", "LlamaCppSoftware", "release_archives"]

RUNNER = "engine_plugin.engines.llamacpp.runner"
_NEEDED_BYTES = 400 * 1024 * 1024
_PYTHON = "python"
"""The directory of gguf in an installed release."""

_DOWNLOADS = "https://github.com/ggml-org/llama.cpp/releases/download"
_DIGESTS = "https://api.github.com/repos/ggml-org/llama.cpp/releases/tags"
"""llama.cpp publishes no checksum file; GitHub's API has the SHA-256 of each file."""

# The archives by system, processor and accelerator. Since about release b7800 each is a .tar.gz, on Windows a .zip.
# Older releases use other names, and the versions of CUDA and ROCm change: `engine.archives` can name other archives.
_NAMES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("linux", "amd64", "cpu"): ("llama-{tag}-bin-ubuntu-x64.tar.gz",),
    ("linux", "arm64", "cpu"): ("llama-{tag}-bin-ubuntu-arm64.tar.gz",),
    ("linux", "amd64", "vulkan"): ("llama-{tag}-bin-ubuntu-vulkan-x64.tar.gz",),
    ("linux", "arm64", "vulkan"): ("llama-{tag}-bin-ubuntu-vulkan-arm64.tar.gz",),
    ("linux", "amd64", "rocm"): ("llama-{tag}-bin-ubuntu-rocm-7.2-x64.tar.gz",),
    ("darwin", "arm64", "metal"): ("llama-{tag}-bin-macos-arm64.tar.gz",),
    ("darwin", "amd64", "cpu"): ("llama-{tag}-bin-macos-x64.tar.gz",),
    ("windows", "amd64", "cpu"): ("llama-{tag}-bin-win-cpu-x64.zip",),
    ("windows", "arm64", "cpu"): ("llama-{tag}-bin-win-cpu-arm64.zip",),
    ("windows", "amd64", "vulkan"): ("llama-{tag}-bin-win-vulkan-x64.zip",),
    ("windows", "amd64", "rocm"): ("llama-{tag}-bin-win-hip-radeon-x64.zip",),
    # The second contains NVIDIA's libraries for the first.
    ("windows", "amd64", "cuda"): (
        "llama-{tag}-bin-win-cuda-12.4-x64.zip",
        "cudart-llama-bin-win-cuda-12.4-x64.zip",
    ),
}


class LlamaCppSoftware(LocalSoftware[LlamaCppOptions]):
    """The software of llama.cpp in one data directory."""

    engine = "llamacpp"
    title = "llama.cpp"
    program = "llama-server"
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

    def _missing(self) -> tuple[str, str]:
        if self._wanted != "llama-server":
            return "llama.cpp is not installed", ""
        return (
            f"no llama-server: {self._options.llama_server or 'none on PATH'}",
            "Install llama.cpp's llama-server yourself, or set engine.backend to xllamacpp or release",
        )

    def _candidates(self) -> Iterator[Backend]:
        wanted, current = self._wanted, self._installation.current()
        if wanted in ("auto", "llama-server"):
            executable = locate_program(self._options.llama_server or self.program, self._environ)
            if executable:
                site = self._site()
                folder = current.folder if current is not None and site is not None else None
                yield Backend("llama-server", "", f"llama-server at {executable}", executable, site, folder)
        if current is not None and wanted in ("auto", current.facts.get("kind")):
            yield self._installed(current.folder, current.facts)
        if wanted in ("auto", "xllamacpp") and (version := distribution_version(None, "xllamacpp")):
            yield Backend("xllamacpp", version, "xllamacpp beside engine-plugin")

    def _site(self) -> Path | None:
        """The directory of Python packages of the current version."""
        current = self._installation.current()
        return None if current is None else self._installed(current.folder, current.facts).site

    def _missing_parts(self, backend: Backend) -> str:  # noqa: ARG002  # any backend can use any gguf
        site = self._site()
        if distribution_version(None, "gguf") or (site is not None and distribution_version([str(site)], "gguf")):
            return ""
        return "the Python package gguf is missing. Call InstallEngine"

    def helper(self, verb: str) -> tuple[list[str], dict[str, str]]:
        """argv and environment for the runner's `probe` and `inspect`."""
        return python.module_command(RUNNER, verb), python.module_environ(self._environ, self._site())

    async def probe(self, backend: Backend) -> dict[str, Any]:
        """Run the software once: {"version": …, "devices": [{"name", "type", …}]}. Raises EngineStartError."""
        server = backend.kind == "llama-server"
        argv = [backend.executable, "--version"] if server else python.module_command(RUNNER, "probe")
        out, err = await self._run(backend, argv, python.module_environ(self._environ, backend.site))
        if server:
            found = re.search(r"version:\s*(\S+)", (out + err).decode("utf-8", "replace"))
            return {"version": f"b{found.group(1)}" if found else "unknown", "devices": None}
        shape: dict[str, Any] = json.loads(out)
        return shape

    def _kind(self) -> str:
        return "release" if self._wanted == "release" else "xllamacpp"

    def _up_to_date(self, backend: Backend) -> bool:
        if self._wanted == "release":
            return self._has_wanted_release()
        return backend.kind == "llama-server" or backend.version == self.wanted_version

    def _archives(self) -> tuple[Archive, ...]:
        options = self._options
        if self._wanted != "release":
            return ()
        known = options.archives or release_archives(self.wanted_version, options.mirror, options.checksums)
        return select_archives(known, options.accelerator)

    async def _fill(self, folder: Path, archives: tuple[Archive, ...], progress: Progress) -> None:
        if not archives:
            await self._require_room(folder, _NEEDED_BYTES, "xllamacpp")
            await self._install_distribution(folder, progress, "xllamacpp")
            return
        await self._unpack(archives, folder / "llama.cpp", progress)
        if not distribution_version(None, "gguf"):
            await self.install_packages(folder / _PYTHON, progress, without=("xllamacpp",))

    def _installed(self, folder: Path, facts: Mapping[str, str]) -> Backend:
        version = facts.get("version", "")
        if facts.get("kind") == "release":
            site = folder / _PYTHON
            executable = str(folder / facts.get("executable", self.program))
            origin = f"llama-server in {folder}"
            return Backend("llama-server", version, origin, executable, site if site.is_dir() else None, folder)
        version = version or distribution_version([str(folder)], "xllamacpp")
        return Backend("xllamacpp", version, f"xllamacpp in {folder}", site=folder, folder=folder)


def release_archives(tag: str, mirror: str, checksums: str) -> tuple[Archive, ...]:
    """The archives of release `tag`, such as b11549.

    A `mirror` has the layout <mirror>/<tag>/<file>. The digests come from `checksums`, else from the mirror's
    <tag>/SHA256SUMS, else from GitHub.
    """
    base = mirror.rstrip("/") or _DOWNLOADS
    digests = checksums or (f"{base}/{tag}/SHA256SUMS" if mirror else f"{_DIGESTS}/{tag}")
    return tuple(
        Archive(f"{base}/{tag}/{name.format(tag=tag)}", system, machine, accelerator, checksums=digests)
        for (system, machine, accelerator), names in _NAMES.items()
        for name in names
    )
