"""Runs the Go host's scenarios and checks that nothing is left afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from engine_plugin.manifest import load_manifest
from tests.patience import pace, patience

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SOURCES", "Check", "GoHost", "RunningHost", "executable_of", "run_go"]

SOURCES = Path(__file__).parent / "host"
_MARK = "ENGINE_PLUGIN_CONFORMANCE_RUN"
_LIMIT = patience(60)  # for a scenario
_BUILD_LIMIT = patience(100)
# The host kills the plugin for its handshake line, and the next one removes its socket; or the test still serves.
_SOCKETS_STAY = ("multiplex", "wrong-version", "reattach")


@dataclass(frozen=True)
class Check:
    """One line of the host's report."""

    scenario: str
    name: str
    ok: bool
    detail: str
    millis: float

    @classmethod
    def parse(cls, line: str) -> Check:
        return cls(**json.loads(line))


def run_go(*arguments: str, module: Path = SOURCES) -> str:
    """Run the go command on a module, which downloads through the module proxy that Go is set up with."""
    command = ["go", *arguments]
    done = subprocess.run(command, cwd=module, capture_output=True, text=True, timeout=_BUILD_LIMIT)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
    return done.stdout


def executable_of(plugin: Path) -> Path:
    """The launcher of a built plugin directory."""
    return load_manifest(plugin / "plugin.yaml").executable()


def _still_there(mark: str) -> list[psutil.Process]:
    """Return the processes with a run's mark in their environment: host, plugin, engines and their descendants."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):  # it has just gone, or is not ours
            continue
    return found


class RunningHost:
    """A running scenario."""

    def __init__(self, process: subprocess.Popen[str], mark: str, log: Path) -> None:
        self.process = process
        self._mark = mark
        self._log = log

    def family(self) -> list[psutil.Process]:
        """Return the host and all its descendants."""
        return _still_there(self._mark)

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


class GoHost:
    """The built host. `seen` collects every check that it reports."""

    def __init__(self, binary: Path, seen: list[Check]) -> None:
        self.binary = binary
        self._seen = seen

    def scenarios(self) -> list[str]:
        listed = subprocess.run([self.binary, "-scenario", "list"], capture_output=True, text=True, check=True)
        return [line.split()[0] for line in listed.stdout.splitlines()]

    @contextmanager
    def start(
        self, scenario: str, executable: Path, scratch: Path, *arguments: str, **environ: str
    ) -> Iterator[RunningHost]:
        """Start a scenario with data and sockets below `scratch`; kill all its processes at the end."""
        mark = uuid.uuid4().hex
        log = scratch / f"{scenario}.log"
        variables = {
            _MARK: mark,
            "AOG_DATA_DIR": str(scratch / "data"),
            "TMPDIR": str(scratch),
            "TEST_PACE": str(pace(1.0)),
        }
        variables |= environ
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [self.binary, "-plugin", executable, "-scenario", scenario, *arguments],
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
            )
            running = RunningHost(process, mark, log)
            try:
                yield running
            finally:
                for left in running.family():
                    left.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()

    def note(self, line: str) -> Check:
        check = Check.parse(line)
        self._seen.append(check)
        return check

    def run(self, scenario: str, executable: Path, scratch: Path, *arguments: str, **environ: str) -> list[Check]:
        """Run a scenario to its end; assert that every check passed and that no process or socket is left."""
        with self.start(scenario, executable, scratch, *arguments, **environ) as running:
            output, _ = running.process.communicate(timeout=_LIMIT)
            checks = [self.note(line) for line in output.splitlines()]
            wrong = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
            assert checks, running.log[-4000:]
            assert not wrong, "\n".join([*wrong, "", running.log[-4000:]])
            assert running.process.returncode == 0
            left = running.family()
            assert left == [], f"left behind: {left}"
            sockets = [path for path in scratch.rglob("*") if path.is_socket()]
            assert sockets == [] or scenario in _SOCKETS_STAY, f"left behind: {sockets}"
            return checks
