"""The real command in a private home, with a plugin whose engine is tests/cli/fake_engine.py.

Most commands run in the tests' own process, and spawn real plugins and servers. What is about the command's own
process runs in one: signals, terminals, locales, logging, `serve`, and one whole life in test_engine.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.patience import LIMIT

from .here import run_here

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "engine_plugin.cli.main"]

MANIFEST = """\
version: "1.0"
provider:
  name: fake-plugin
  display_name: Fake
  version: 1.2.3
  type: local
services:
  - service_name: chat
    task_type: text-generation
    protocol: HTTP
    expose_protocol: HTTP
    endpoint: /v1/chat/completions
    default_model: tiny
    config_ref: openai:chat
    timeout: 60
    capabilities:
      support_streaming: true
      support_bidirectional: false
platforms:
  linux_amd64:
    executable: bin/linux-amd64/fake-plugin
engine:
  name: fake
resources:
  data_dir: "${AOG_DATA_DIR}/engines/fake"
"""


@dataclass
class Workplace:
    """One user's machine: a home, a plugin, and the command."""

    home: Path
    runtime: Path
    plugin: Path
    env: dict[str, str] = field(default_factory=dict)
    apart: bool = False
    """Whether each command gets a process of its own."""

    @property
    def data(self) -> Path:
        """Return the plugin's data directory."""
        return self.home / "aog" / "engines" / "fake"

    @property
    def journal(self) -> list[str]:
        """Return the journal of the engine's requests."""
        file = self.data / "journal"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, without a terminal."""
        done = self.fed(b"", *arguments, **env)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def fed(self, stdin: bytes, *arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end, with something on its standard input."""
        if not self.apart:
            return run_here(arguments, self.env | env, self.plugin, stdin)
        return subprocess.run(
            [*COMMAND, *arguments],
            env=self.env | env,
            cwd=self.plugin,
            input=stdin,
            capture_output=True,
            timeout=LIMIT,
        )

    def good(self, *arguments: str, **env: str) -> str:
        """Run a command that must succeed, and return its output."""
        done = self.run(*arguments, **env)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def bad(self, status: int, *arguments: str, **env: str) -> str:
        """Run a command that must fail with that status, and return its message of one or two lines."""
        done = self.run(*arguments, **env)
        assert done.returncode == status, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a command; the test ends it."""
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self.env | env,
            cwd=self.plugin,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def install(self) -> None:
        """Install the engine's software, as `engine install` leaves it."""
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / "installed").touch()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A server for the commands inside the block, each of which would spawn a plugin without it."""
        self.good("engine", "start")
        try:
            yield
        finally:
            self.good("engine", "stop")

    def processes(self) -> list[psutil.Process]:
        """Every process of this workplace."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Workplace]:
    """A private workplace for one test."""
    with new_workplace(tmp_path) as place:
        yield place


@contextmanager
def new_workplace(tmp_path: Path) -> Iterator[Workplace]:
    """A workplace below `tmp_path`; afterwards no process of it may be left."""
    runtime = Path(tempfile.mkdtemp(prefix="ep-"))
    plugin = tmp_path / "plugins" / "fake-plugin"
    plugin.mkdir(parents=True)
    (plugin / "plugin.yaml").write_text(MANIFEST)
    site = tmp_path / "site" / "fake_engine-1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-engine\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[engine_plugin.engines]\nfake = tests.cli.fake_engine:FakeEngine\n")
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ENGINE_PLUGIN", "XDG", "AOG"))}
    env |= {
        "HOME": str(home),
        "AOG_DATA_DIR": str(home / "aog"),
        "XDG_RUNTIME_DIR": str(runtime),
        "PYTHONPATH": os.pathsep.join([str(site.parent), str(REPOSITORY)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    place = Workplace(home, runtime, plugin, env)
    try:
        yield place
        assert place.processes() == []
    finally:
        for process in place.processes():
            process.kill()
            process.wait(LIMIT)
        shutil.rmtree(runtime)


@pytest.fixture
def managed(workplace: Workplace) -> Workplace:
    """A workplace whose engine is that of managing.py, installed, with models of several kinds."""
    site = Path(workplace.env["PYTHONPATH"].split(os.pathsep)[0])
    for points in site.glob("*/entry_points.txt"):
        points.write_text("[engine_plugin.engines]\nfake = tests.cli.managing:ManagingEngine\n")
    (workplace.data / "models").mkdir(parents=True)
    workplace.install()
    for name in ("embedder", "guessed", "nobody-knows", "painter", "tagged:latest"):
        (workplace.data / "models" / name).write_bytes(b"x" * 10_000)
    return workplace
