"""How the measured plugins are started: ours by its launcher, and any other from its directory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from benchmarks.results import PLUGIN
from benchmarks.targets import REPOSITORY
from engine_plugin import PLUGIN_DIR
from engine_plugin.host import launch
from engine_plugin.host.handshake import plugin_environment
from engine_plugin.host.process import PluginProcess
from engine_plugin.manifest import load_manifest, manifest_file, platform_key
from engine_plugin.rpc.choice import use_grpcio

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.host import PluginClient

__all__ = ["PEER", "Peer", "Program", "built_is_current", "ours", "read_peer"]

PEER = "peer"
_GRPCIO = "plugin on grpcio"
_BUILT = REPOSITORY / "dist" / "plugins" / "ollama-plugin"
_START_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Program:
    """A plugin as a host starts it. `name` is that of its column."""

    name: str
    executable: Path
    env: Mapping[str, str]

    async def launch(self) -> PluginClient:
        """Start it and wait until it is healthy."""
        return await launch(
            [str(self.executable)], name=self.name, cwd=self._cwd, env=self.env, start_timeout=_START_TIMEOUT
        )

    async def spawn(self) -> PluginProcess:
        """Only start it."""
        environ = plugin_environment(self.env)
        return await PluginProcess.spawn(self.name, [str(self.executable)], cwd=self._cwd, env=environ, on_log=None)

    @property
    def _cwd(self) -> Path:
        return self.executable.parent.parent


@dataclass(frozen=True, slots=True)
class Peer:
    """Another plugin, and where it expects its engine (HOST:PORT)."""

    program: Program
    engine: str


def read_peer(folder: Path, home: Path) -> Peer:
    """The plugin in a directory, whose home and temporary files will be in `home`. Raises RuntimeError.

    Only these two values are read: another plugin's manifest need not have what ours must.
    """
    file = manifest_file(folder)
    if file is None:
        raise RuntimeError(f"{folder}: no plugin.yaml. Name the directory of a plugin after --peer")
    shape = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        executable = folder / shape["platforms"][platform_key()]["executable"]
        engine = urlsplit(shape["provider"]["engine_host"]).netloc
    except (KeyError, TypeError):
        raise RuntimeError(f"{file}: needs platforms.{platform_key()}.executable and provider.engine_host") from None
    return Peer(Program(PEER, executable, {"HOME": str(home), "TMPDIR": str(home)}), engine)


def built_is_current() -> bool:
    """Whether `make build` has built the plugin for Ollama from these sources."""
    for source in (REPOSITORY / "engine_plugin").rglob("*.py"):
        copy = _BUILT / "lib" / source.relative_to(REPOSITORY)
        if not copy.is_file() or copy.read_bytes() != source.read_bytes():
            return False
    return True


def ours(scratch: Path, folder: Path | None = None, *, both: bool = False) -> list[Program]:
    """Our plugin, with the plugin.yaml of `folder` or its own; `both`: on grpcio, too, where it is installed.

    It is the one that `make build` has built, when that is of these sources, else a launcher of this checkout in
    `scratch`. Only the latter has grpcio.
    """
    env = {PLUGIN_DIR: str(folder)} if folder else {"AOG_DATA_DIR": str(scratch / "data")}
    linked = _linked(scratch / "plugins")
    found = [Program(PLUGIN, _executable(_BUILT) if built_is_current() else linked, env)]
    if both and find_spec("grpc") and not use_grpcio():
        found.append(Program(_GRPCIO, linked, {**env, "ENGINE_PLUGIN_GRPC": "grpcio"}))
    return found


def _linked(plugins: Path) -> Path:
    folder = plugins / _BUILT.name
    if not folder.exists():
        arguments = ("--linked", "--output", str(plugins), "plugins/ollama/plugin.yaml")
        command = [sys.executable, "scripts/build.py", *arguments]
        subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    return _executable(folder)


def _executable(folder: Path) -> Path:
    return load_manifest(folder / "plugin.yaml").executable()
