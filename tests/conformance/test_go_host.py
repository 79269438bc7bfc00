"""The plugin under a real go-plugin host, which behaves as AOG does. What the checks are: tests/conformance/host."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from build import build, build_linked
from pins import ROOT
from tests.conformance.gohost import SOURCES, executable_of, run_go

if TYPE_CHECKING:
    from tests.conformance.gohost import Check, GoHost

if shutil.which("go") is None:
    pytest.skip("Go is not installed: the Go host was not run", allow_module_level=True)

PLAIN = (
    "lifecycle",
    "errors",
    "kill-streaming",
    "kill-starting",
    "kill-idle",
    "tcp",
    "automtls",
    "multiplex",
    "wrong-version",
    "wrong-cookie",
)
POSIX = ("sigint", "socket-group")
SPECIAL = ("stdio", "broken-manifest", "hold")

NOISE = '''
import os, threading, time

def noise():
    """Print more than the host would read, once standard output has been redirected; one line is over 64 KiB."""
    first = os.fstat(1)
    for _ in range(2000):
        if not os.path.samestat(first, os.fstat(1)):
            for text in (b"conformance-noise" * 6000, *[b"conformance-noise\\n" * 100] * 60):
                while text:
                    text = text[os.write(1, text):]
            return
        time.sleep(0.005)

threading.Thread(target=noise, daemon=True).start()
'''


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.mark.parametrize("scenario", PLAIN)
def test_scenario(go_host: GoHost, plugin: Path, scratch: Path, scenario: str) -> None:
    go_host.run(scenario, plugin, scratch)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGINT for others nor groups of sockets")
@pytest.mark.parametrize("scenario", POSIX)
def test_posix_scenario(go_host: GoHost, plugin: Path, scratch: Path, scenario: str) -> None:
    go_host.run(scenario, plugin, scratch)


def test_every_scenario_is_run(go_host: GoHost) -> None:
    assert sorted(go_host.scenarios()) == sorted((*PLAIN, *POSIX, *SPECIAL))


def test_noise_on_stdout_reaches_the_host(go_host: GoHost, scratch: Path) -> None:
    directory = build_linked(ROOT / "plugin.yaml", scratch)
    start = directory / "lib" / "start_plugin.py"
    text = start.read_text(encoding="utf-8")
    begin = 'if __name__ == "__main__":'
    start.write_text(text.replace(begin, f"{NOISE}\n{begin}"), encoding="utf-8")
    go_host.run("stdio", executable_of(directory), scratch)


def test_a_broken_manifest_is_told_to_the_host(go_host: GoHost, scratch: Path) -> None:
    directory = build_linked(ROOT / "plugin.yaml", scratch)
    executable = executable_of(directory)
    manifest = directory / "plugin.yaml"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace("type: local", "type: distant"), encoding="utf-8")
    go_host.run("broken-manifest", executable, scratch)


@pytest.mark.slow
def test_a_complete_plugin_directory_works_where_it_was_moved_to(go_host: GoHost, scratch: Path) -> None:
    """The whole way of a user: build, move, and let the host install the engine, with pip and its hashes."""
    built = build(ROOT / "plugin.yaml", scratch / "built")
    moved = scratch / "plugins of mine" / built.name
    moved.parent.mkdir()
    built.rename(moved)
    checks = go_host.run("lifecycle", executable_of(moved), scratch)
    assert named(checks, "CheckEngine").detail.startswith("installed: false")
    assert str(scratch) in named(checks, "InstallEngine").detail
    assert [path.name for path in (scratch / "built").iterdir()] == []


def test_everything_ends_when_the_host_is_killed(go_host: GoHost, plugin: Path, scratch: Path) -> None:
    with go_host.start("hold", plugin, scratch) as running:
        limit = threading.Timer(60, running.process.kill)
        limit.start()
        try:
            assert running.process.stdout is not None
            checks = []
            for line in running.process.stdout:
                checks.append(go_host.note(line))
                if checks[-1].name == "holding":
                    break
        finally:
            limit.cancel()
        assert all(check.ok for check in checks), running.log[-4000:]
        assert checks[-1].name == "holding", running.log[-4000:]
        family = [process for process in running.family() if process.pid != running.process.pid]
        assert len(family) >= 2, "no engine beside the plugin"
        running.process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []


def test_the_host_is_formatted_and_vetted() -> None:
    run_go("vet", "./...")
    gofmt = shutil.which("gofmt") or str(Path(run_go("env", "GOROOT").strip(), "bin", "gofmt"))
    done = subprocess.run([gofmt, "-l", "."], cwd=SOURCES, capture_output=True, text=True, check=True)
    assert done.stdout == ""
