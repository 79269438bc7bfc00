"""The OpenVINO software: detection, installation and upgrade.

Two kinds answer the same requests: OpenVINO Model Server (`ovms`), and the embedded server on the Python package
openvino-genai (`embedded`). With `engine.backend: auto`, the first of these is used: the ovms that
plugin.yaml names or that is on PATH; the release of ovms or the openvino-genai that InstallEngine installed below the
data directory; openvino-genai beside this package (the extra `openvino`). All but the first include the packages that
decode audio.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.openvino.options import OpenVinoOptions
from engine_plugin.engines.openvino.releases import RELEASE, Machine, missing_library, release_archive
from engine_plugin.errors import InstallError
from engine_plugin.install.releases import select_archives
from engine_plugin.install.software import (
    Backend,
    LocalSoftware,
    distribution_version,
    find_unpacked_program,
    locate_program,
    pinned_versions,
    requested_backend,
)
from engine_plugin.process import python
from engine_plugin.process.environ import child_environ
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from engine_plugin.engines.base import Progress
    from engine_plugin.install.releases import Archive

__all__ = ["SERVER_MODULE", "OpenVinoSoftware", "server_environ"]

SERVER_MODULE = "openvino_server"
_GENAI = "openvino-genai"
_OPENVINO = (_GENAI, "openvino", "openvino-tokenizers", "openvino-telemetry")
_AUDIO = ("av",)
"""The packages that decode audio (speech.decoder_program)."""

_TEMPLATES = ("jinja2", "markupsafe")
_NEEDED_BYTES = {"embedded": 600 * 1024 * 1024, "release": 1200 * 1024 * 1024, "packages": 250 * 1024 * 1024}

# Below an installed version's directory
_OVMS_FOLDER = "ovms"
_AUDIO_FOLDER = "python"
_TEMPLATES_FOLDER = "templates"

_VERSION = re.compile(r"OpenVINO Model Server (\d+\.\d+(?:\.\d+)?)")


class OpenVinoSoftware(LocalSoftware[OpenVinoOptions]):
    """OpenVINO for one data directory."""

    engine = "openvino"
    title = "OpenVINO"
    program = "ovms"
    requirements = Path(__file__).with_name("requirements.txt")

    @property
    def wanted_version(self) -> str:
        """The version that InstallEngine would install, of OpenVINO Model Server or of openvino-genai."""
        if self._options.version:
            return self._options.version
        return RELEASE if self._wanted == "release" else pinned_versions(self.requirements)[_GENAI]

    @property
    def _wanted(self) -> str:
        options = self._options
        return requested_backend(options.backend, {"ovms": options.ovms, "release": options.archives})

    def _missing(self) -> tuple[str, str]:
        if self._wanted != "ovms":
            return "OpenVINO is not installed", ""
        way = "release (this plugin fetches OpenVINO Model Server) or embedded"
        return (
            f"no OpenVINO Model Server: {self._options.ovms or 'no ovms on PATH'}",
            f"Install it yourself, or set engine.backend to {way}",
        )

    def _candidates(self) -> Iterator[Backend]:
        wanted = self._wanted
        if wanted in ("auto", "ovms") and (foreign := self._installed_elsewhere()) is not None:
            yield foreign
        current = self._installation.current()
        kind = current.facts.get("kind") if current is not None else None
        if current is not None and kind != "packages" and wanted in ("auto", kind):
            yield self._installed(current.folder, current.facts)
        if wanted in ("auto", "embedded") and (version := distribution_version(None, _GENAI)):
            yield Backend("embedded", version, f"{_GENAI} beside engine-plugin")

    def _installed_elsewhere(self) -> Backend | None:
        """The ovms that was on this machine before."""
        executable = locate_program(self._options.ovms or "ovms", self._environ)
        if not executable:
            return None
        backend = Backend("ovms", "", f"OpenVINO Model Server at {executable}", executable=executable)
        current = self._installation.current()
        return backend if current is None else _with_packages(backend, current.folder, current.facts.get("kind", ""))

    def _missing_parts(self, backend: Backend) -> str:
        lacking = ", ".join(_lacking(backend.site))
        return lacking and f"the Python packages for audio ({lacking}) are missing"

    async def probe(self, backend: Backend) -> dict[str, Any]:
        """Run the software once: {"version": …, "devices": [{"name", "description"}] or None where it lists none}.

        Raises EngineStartError.
        """
        if backend.kind == "ovms":
            argv = [backend.executable, "--version"]
            out, err = await self._run(backend, argv, server_environ(backend, self._environ))
            found = _VERSION.search((out + err).decode("utf-8", "replace"))
            return {"version": found[1] if found else "unknown", "devices": None}
        environ = python.module_environ(self._environ, backend.site)
        out, _ = await self._run(backend, python.module_command(SERVER_MODULE, "probe"), environ)
        shape: dict[str, Any] = json.loads(out)
        return {**shape, "version": str(shape["version"]).partition("-")[0]}  # the version for pip, without the build

    def _exit_reason(self, status: int, words: str) -> str:
        missing = missing_library(words)
        return f"here: {missing}" if missing else super()._exit_reason(status, words)

    def _up_to_date(self, backend: Backend) -> bool:
        kind = self._kind()
        if kind == "release":
            return self._has_wanted_release()
        return kind == "packages" or backend.version == self.wanted_version

    def _kind(self) -> str:
        """The kind of installation: release, embedded, or packages (those that an ovms on this machine lacks)."""
        if self._wanted == "release":
            return "release"
        return (
            "packages" if self._wanted in ("auto", "ovms") and self._installed_elsewhere() is not None else "embedded"
        )

    async def _fill(self, folder: Path, archives: tuple[Archive, ...], progress: Progress) -> None:
        kind = await in_thread(self._kind)
        await self._require_room(folder, _NEEDED_BYTES[kind], "OpenVINO")
        if kind == "embedded":
            await self._install_distribution(folder, progress, *_OPENVINO)
            return
        if archives:
            await self._unpack(archives, folder / _OVMS_FOLDER, progress)
        if await in_thread(_lacking, None):
            await self.install_packages(folder / _AUDIO_FOLDER, progress, only=_AUDIO)
        if await in_thread(self._imports_python, folder if archives else None):
            await self.install_packages(folder / _TEMPLATES_FOLDER, progress, only=_TEMPLATES)

    def _installed(self, folder: Path, facts: Mapping[str, str]) -> Backend:
        kind, version = facts.get("kind", ""), facts.get("version", "")
        if kind == "embedded":
            version = version or distribution_version([str(folder)], _GENAI)
            return Backend("embedded", version, f"{_GENAI} in {folder}", site=folder, folder=folder)
        if kind == "release":
            executable = str(folder / facts.get("executable", self.program))
            origin = f"OpenVINO Model Server in {folder}"
            backend = Backend("ovms", version, origin, executable=executable, folder=folder)
        elif (foreign := self._installed_elsewhere()) is not None:
            backend = foreign
        else:
            raise InstallError(
                f"{self._missing()[0]}: it was removed during the installation of its packages. Install again"
            )
        return _with_packages(backend, folder, kind)

    def _imports_python(self, unpacked: Path | None) -> bool:
        """Whether the unpacked ovms, else this machine's, has Python but not the packages that it imports."""
        if sys.platform == "win32":
            return False  # the archive contains them
        foreign = self._installed_elsewhere()
        program = (
            str(find_unpacked_program(unpacked, self.program)) if unpacked else foreign.executable if foreign else ""
        )
        return bool(program) and (_home_of(program) / "lib" / "python").is_dir()

    def _archives(self) -> tuple[Archive, ...]:
        options = self._options
        if self._kind() != "release":
            return ()
        if options.archives:
            return select_archives(options.archives, "auto")
        machine = Machine.this(self._environ)
        flavour = machine.flavour() if options.ovms_flavour == "auto" else options.ovms_flavour
        auto = options.ovms_python == "auto"
        with_python = machine.has_python_for(flavour) if auto else options.ovms_python == "on"
        version = self.wanted_version
        return (release_archive(version, flavour, options.mirror, options.checksums, with_python=with_python),)


def server_environ(backend: Backend, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for an ovms: its libraries and its Python packages, without those of the plugin's Python."""
    home = _home_of(backend.executable)
    obeyed = {"API_KEY", "OVMS_MODEL_REPOSITORY_PATH"}
    env = {name: value for name, value in child_environ(environ).items() if name not in obeyed}
    before, places, speech = env.get("PATH", ""), [], home / "share" / "espeak-ng-data"
    if sys.platform == "win32":
        interpreter, speech = home / "python", home / "espeak-ng-data"
        env["PATH"] = os.pathsep.join(map(str, (home, interpreter, interpreter / "Scripts", before)))
        if interpreter.is_dir():
            env["PYTHONHOME"] = str(interpreter)
    else:
        libraries = home / "lib"
        env["PATH"] = os.pathsep.join(filter(None, (before, str(home / "bin"))))
        if any(libraries.glob("libopenvino.so*")):
            known = (str(libraries), env.get("LD_LIBRARY_PATH", ""))
            env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, known))
        places = [libraries / "python"]
    if speech.is_dir():
        env["ESPEAK_DATA_PATH"] = str(speech)
    places += [backend.folder / _TEMPLATES_FOLDER] if backend.folder else []
    if there := [str(place) for place in places if place.is_dir()]:
        env["PYTHONPATH"] = os.pathsep.join(there)
    return env


def _home_of(executable: str) -> Path:
    """The directory that an archive of OpenVINO Model Server unpacks to."""
    place = Path(executable).resolve().parent
    return place.parent if place.name == "bin" else place


def _with_packages(backend: Backend, folder: Path, kind: str) -> Backend:
    """An `ovms` with the Python packages in the directory of an installed version of this kind."""
    site = folder if kind == "embedded" else folder / _AUDIO_FOLDER
    used = backend.folder is not None or site.is_dir() or (folder / _TEMPLATES_FOLDER).is_dir()
    return replace(backend, site=site if site.is_dir() else None, folder=folder if used else None)


def _lacking(site: Path | None) -> list[str]:
    """The packages for audio that are neither in `site` nor beside this package. Blocking."""
    places = [] if site is None else [str(site)]
    return [
        name
        for name in _AUDIO
        if not (distribution_version(None, name) or (places and distribution_version(places, name)))
    ]
