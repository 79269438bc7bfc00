"""The llama.cpp software: which one is on this machine, installing it, upgrading it.

Places, in the order they are looked at (`engine.backend: auto`): a llama-server that plugin.yaml names or that
is on PATH; xllamacpp installed below the data directory by InstallEngine; xllamacpp beside this package
(the extra `llamacpp`). GGUF headers are read with the `gguf` package, which comes with the last two.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.engines import python, tree
from engine_plugin.engines.base import EngineCheck
from engine_plugin.errors import EngineNotInstalledError, EngineStartError, InstallError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from filelock import FileLock

    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.llamacpp.options import LlamaCppOptions

__all__ = ["RUNNER", "Backend", "Software"]

log = logging.getLogger(__name__)

RUNNER = "engine_plugin.engines.llamacpp.runner"
_REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_NEEDED_BYTES = 400 * 1024 * 1024
_PROBE_TIMEOUT = 60.0
_LOCK_TIMEOUT = 600.0
_LOCK_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Backend:
    """One usable llama.cpp: its version, where it is in words, and the package directory that it needs."""

    kind: str
    version: str
    origin: str
    site: Path | None = None
    executable: str = ""


class Software:
    """Finds, installs and probes llama.cpp for one data directory. Owned by the engine driver."""

    def __init__(self, options: LlamaCppOptions, data_dir: Path, environ: Mapping[str, str]) -> None:
        self._options = options
        self._root = data_dir / "software"
        self._environ = environ

    @property
    def folder(self) -> Path:
        """Where InstallEngine puts versions."""
        return self._root

    @property
    def wanted_version(self) -> str:
        """The xllamacpp version that an installation gives."""
        return self._options.version or _pinned()["xllamacpp"]

    def check(self) -> EngineCheck:
        """Look for the software without running it."""
        backend = self._find()
        if backend is None:
            return EngineCheck(False, self._missing())
        if not self._can_inspect():
            return EngineCheck(False, f"{backend.origin} is here, but the Python package gguf is not: InstallEngine")
        return EngineCheck(True, f"{backend.origin}, version {backend.version or 'unknown until it runs'}")

    def find(self) -> Backend:
        """The backend to run. Raises EngineNotInstalledError."""
        backend = self._find()
        if backend is None or not self._can_inspect():
            raise EngineNotInstalledError(f"{self.check().detail}. Call InstallEngine (engine-plugin engine install)")
        return backend

    @property
    def _wanted(self) -> str:
        """The backend that is asked for; a llama-server that plugin.yaml names is not passed over in mode auto."""
        named = self._options.backend == "auto" and self._options.llama_server
        return "llama-server" if named else self._options.backend

    def _missing(self) -> str:
        if self._wanted == "llama-server":
            return f"no llama-server: {self._options.llama_server or 'none on PATH'}"
        return "llama.cpp is not installed"

    def _find(self) -> Backend | None:
        wanted = self._wanted
        if wanted in ("auto", "llama-server"):
            name = self._options.llama_server or "llama-server"
            executable = shutil.which(name, path=self._environ.get("PATH"))
            if executable:
                return Backend("llama-server", "", f"llama-server at {executable}", self._site(), executable)
            if wanted == "llama-server":
                return None
        site = self._site()
        if site is not None:
            return Backend("xllamacpp", _version_in([str(site)], "xllamacpp"), f"xllamacpp in {site}", site)
        version = _version_in(None, "xllamacpp")
        return Backend("xllamacpp", version, "xllamacpp beside engine-plugin") if version else None

    def _site(self) -> Path | None:
        """The directory of the version that is switched on."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            site = self._root / str(json.loads((self._root / "current.json").read_text())["folder"])
            if site.is_dir():
                return site
        return None

    def _can_inspect(self) -> bool:
        site = self._site()
        return bool(_version_in(None, "gguf") or (site is not None and _version_in([str(site)], "gguf")))

    def helper(self, verb: str) -> tuple[list[str], dict[str, str]]:
        """argv and environment for the runner's `probe` and `inspect`."""
        return python.module_command(RUNNER, verb), python.module_environ(self._environ, self._site())

    async def probe(self, backend: Backend) -> dict[str, Any]:
        """Run the software once: {"version": …, "devices": [{"name", "type", …}]}. Raises EngineStartError."""
        environ = python.module_environ(self._environ, backend.site)
        server = backend.kind == "llama-server"
        argv = [backend.executable, "--version"] if server else python.module_command(RUNNER, "probe")
        try:
            status, out, err = await python.run_briefly(argv, environ, timeout=_PROBE_TIMEOUT)
        except OSError as error:
            raise EngineStartError(f"{backend.origin} cannot be run: {error.strerror or error}") from error
        words = (err or out).decode("utf-8", "replace").strip()
        if status != 0:
            raise EngineStartError(f"{backend.origin} does not run (exit code {status}): {words[-500:]}")
        if server:
            found = re.search(r"version:\s*(\S+)", (out + err).decode("utf-8", "replace"))
            return {"version": f"b{found.group(1)}" if found else "unknown", "devices": None}
        shape: dict[str, Any] = json.loads(out)
        return shape

    async def install(self, progress: Progress, *, cover: bool) -> str:
        """Install below the data directory unless something usable is here. Returns what is usable now."""
        check = self.check()
        if check.installed and not cover:
            return check.detail
        if self._wanted == "llama-server" and self._find() is None:
            raise InstallError(
                f"{self._missing()}. plugin.yaml asks for one, which this plugin does not install: install "
                "llama.cpp's llama-server yourself, or set engine.backend to xllamacpp"
            )
        await self._install_beside(progress)
        return self.check().detail

    async def upgrade(self, progress: Progress) -> bool:
        """Bring our xllamacpp to the wanted version; False when there was nothing to do."""
        backend = self._find()
        if backend is not None and (backend.kind == "llama-server" or backend.version == self.wanted_version):
            return False
        await self._install_beside(progress)
        return True

    async def _install_beside(self, progress: Progress) -> None:
        """Install into a new directory, prove that it runs, then switch; on any failure nothing has changed."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(self._root).free
        if free < _NEEDED_BYTES:
            raise InstallError(
                f"not enough disk space in {self._root}: {free >> 20} MiB free, {_NEEDED_BYTES >> 20} MiB needed"
            )
        from filelock import FileLock  # not before the handshake

        lock = FileLock(self._root / "install.lock")
        try:
            async with asyncio.timeout(_LOCK_TIMEOUT):
                await _acquire(lock)
        except TimeoutError:
            raise InstallError(f"another installation holds {lock.lock_file} for {_LOCK_TIMEOUT:g} s") from None
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self._root))
        try:
            progress(f"installing xllamacpp {self.wanted_version} into {self._root}")
            await self._pip(staging, progress)
            progress("checking that it runs")
            probed = await self.probe(Backend("xllamacpp", "", "the new xllamacpp", staging))
            folder = self._root / f"xllamacpp-{probed['version']}-{staging.name.removeprefix('.staging-')}"
            await asyncio.to_thread(self._switch, staging, folder)
        except (OSError, EngineStartError) as error:
            raise InstallError(f"installing xllamacpp failed, nothing was changed: {error}") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
            lock.release()
        await asyncio.to_thread(self._remove_others, folder)

    async def _pip(self, target: Path, progress: Progress) -> None:
        argv = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--target"]
        argv += [str(target), "--only-binary", ":all:", "--progress-bar", "off", "--no-warn-conflicts"]
        if self._options.version:
            argv += [f"xllamacpp=={self._options.version}", f"gguf=={_pinned()['gguf']}"]
        else:
            argv += ["--require-hashes", "-r", str(_REQUIREMENTS)]
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=python.module_environ(self._environ, Path(_pip_home())),
            **tree.spawn_options(),
        )
        said: list[str] = []
        try:
            while process.stdout is not None and (line := await process.stdout.readline()):
                text = line.decode("utf-8", "replace").strip()
                said.append(text)
                if text.startswith(("Collecting", "Downloading", "Installing", "Using cached")):
                    progress(text.partition(" (from")[0])
            status = await process.wait()
        finally:
            if process.returncode is None:
                tree.kill_tree(process.pid)
                await process.wait()
        if status != 0:
            raise InstallError(
                f"pip could not install xllamacpp {self.wanted_version}: {' | '.join(said[-4:])}. "
                "Check the network, or name a mirror in pip's own configuration (`pip config`)"
            )

    def _switch(self, staging: Path, folder: Path) -> None:
        staging.rename(folder)
        scratch = self._root / "current.json.new"
        scratch.write_text(json.dumps({"folder": folder.name}))
        scratch.replace(self._root / "current.json")

    def _remove_others(self, keep: Path) -> None:
        for old in self._root.glob("xllamacpp-*"):
            if old != keep:
                shutil.rmtree(old, ignore_errors=True)  # on Windows files in use stay until the next installation


async def _acquire(lock: FileLock) -> None:
    """Take the lock, without a thread that would go on waiting for it when we are cancelled."""
    from filelock import Timeout

    while True:
        with suppress(Timeout):
            lock.acquire(blocking=False)
            return
        await asyncio.sleep(_LOCK_PAUSE)


def _pip_home() -> str:
    """The directory that holds pip, which may lie beside this package only (a built plugin directory)."""
    import importlib.util

    spec = importlib.util.find_spec("pip")
    if spec is None or spec.origin is None:
        raise InstallError(
            f"pip is missing in {sys.executable}: install it (python -m ensurepip), or xllamacpp and gguf themselves"
        )
    return os.fspath(Path(spec.origin).parent.parent)


def _version_in(path: list[str] | None, name: str) -> str:
    """The version of a distribution in `path` (None: where this Python looks), "" when it is not there."""
    found = importlib.metadata.distributions(name=name, path=sys.path if path is None else path)
    return next((distribution.version for distribution in found), "")


def _pinned() -> dict[str, str]:
    """The versions in requirements.txt by name."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", _REQUIREMENTS.read_text(), re.MULTILINE))
