"""The plugin under a real go-plugin host that behaves as AOG does. The checks are in tests/conformance/host."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
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
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conformance.conftest import Observe
    from tests.conformance.gohost import Check, GoHost

pytestmark = pytest.mark.slow

if shutil.which("go") is None:
    pytest.skip("Go is not installed: the Go host was not run", allow_module_level=True)

PLAIN = (
    "errors",
    "kill-streaming",
    "kill-starting",
    "kill-idle",
    "tcp",
    "multiplex",
    "wrong-version",
    "wrong-cookie",
)
POSIX = ("sigint", "socket-group")
TLS = ("automtls",)
SPECIAL = ("lifecycle", "eight-services", "stdio", "identity", "broken-manifest", "hold", "reattach")
OLLAMA = ("ollama", "ollama-managed", "ollama-hold")  # test_ollama.py
AOG = ("aog",)  # test_aog.py

thorough = pytest.mark.thorough
over_tls = pytest.mark.parametrize("tls", [False, pytest.param(True, marks=thorough)], ids=["plain", "tls"])
"""The scenario `automtls` has the checks of AutoMTLS itself; the others must pass with and without it."""

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, groups and unix sockets are of POSIX")

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


@over_tls
@pytest.mark.parametrize("scenario", [*PLAIN, *(pytest.param(name, marks=posix) for name in POSIX)])
def test_scenario_passes_under_the_go_host(observe: Observe, scenario: str, tls: bool) -> None:
    observe(scenario, tls)


@pytest.mark.promise("G42")
@pytest.mark.parametrize("scenario", ["errors", "kill-streaming", "tcp", "automtls"])
def test_scenario_passes_under_a_newer_go_plugin(
    newer_go_host: GoHost, plugin: Path, scenario: str, scratch: Path
) -> None:
    newer_go_host.run(scenario, plugin, scratch, *(["-automtls"] if scenario == "automtls" else []))


@over_tls
def test_eight_services_answer_under_the_go_host(
    go_host: GoHost, eight_services: Path, scratch: Path, tls: bool
) -> None:
    pytest.importorskip("openvino_genai")
    go_host.run("eight-services", eight_services, scratch, *(["-automtls"] if tls else []))


def test_every_scenario_is_run(go_host: GoHost) -> None:
    assert sorted(go_host.scenarios()) == sorted((*PLAIN, *POSIX, *TLS, *SPECIAL, *OLLAMA, *AOG))


@pytest.mark.parametrize(
    ("scenario", "tls", "checks"),
    [
        pytest.param("wrong-cookie", False, ["the host reports the cause"], marks=pytest.mark.promise("G1")),
        pytest.param("wrong-version", False, ["the host reports the cause"], marks=pytest.mark.promise("G2", "G16")),
        pytest.param("tcp", False, ["address", "GetManifest"], marks=pytest.mark.promise("G3", "G12")),
        pytest.param("tcp", True, ["address", "GetManifest"], marks=[pytest.mark.promise("G3", "G13"), thorough]),
        pytest.param("socket-group", False, ["mode of the socket"], marks=[pytest.mark.promise("G6"), posix]),
        pytest.param(
            "socket-group", True, ["mode of the socket"], marks=[pytest.mark.promise("G6"), posix, thorough]
        ),
        pytest.param("kill-idle", False, ["dispense", "ping"], marks=pytest.mark.promise("G11", "G12", "G14", "G17")),
        pytest.param("automtls", False, ["dispense", "GetManifest"], marks=pytest.mark.promise("G7", "G13", "G39")),
        pytest.param("automtls", False, ["the plugin's certificate"], marks=pytest.mark.promise("G37")),
        pytest.param(
            "automtls",
            False,
            [
                "a client without a certificate",
                "a client with another certificate",
                "a certificate signed by that of the host",
                "TLS 1.1",
                "a client without TLS",
            ],
            marks=pytest.mark.promise("G37", "G38", "G39"),
        ),
        pytest.param(
            "automtls", False, ["connect and close", "ping after the other checks"], marks=pytest.mark.promise("G25")
        ),
        pytest.param("multiplex", False, ["the host reports the cause"], marks=pytest.mark.promise("G8", "G15")),
        pytest.param(
            "multiplex", True, ["the host reports the cause"], marks=[pytest.mark.promise("G8", "G15"), thorough]
        ),
        pytest.param("lifecycle", True, ["dispense", "ping", "no error in the host's log"], marks=thorough),
        pytest.param("errors", False, ["a request of 6 MiB"], marks=pytest.mark.promise("G24")),
        pytest.param("errors", False, ["unknown model", "unknown model, streamed"], marks=pytest.mark.promise("P33")),
        pytest.param("errors", True, ["a request of 6 MiB"], marks=[pytest.mark.promise("G24", "G39"), thorough]),
        pytest.param(
            "sigint", False, ["SIGINT twice", "a call after SIGINT"], marks=[pytest.mark.promise("G33"), posix]
        ),
        pytest.param("kill-streaming", False, ["Kill"], marks=pytest.mark.promise("G20", "G32", "G34")),
        pytest.param("kill-streaming", True, ["Kill"], marks=[pytest.mark.promise("G20", "G34", "G39"), thorough]),
        pytest.param(
            "kill-starting", False, ["Kill while a model is loading"], marks=pytest.mark.promise("G20", "G32", "G34")
        ),
        pytest.param("kill-idle", False, ["Kill", "no error in the host's log"], marks=pytest.mark.promise("G35")),
    ],
)
def test_checks_of_a_promise_pass_under_the_go_host(
    observe: Observe, scenario: str, tls: bool, checks: list[str]
) -> None:
    """For each promise that a go-plugin host can observe, the given checks ran and passed."""
    seen = observe(scenario, tls)
    assert [seen[name].ok for name in checks] == [True] * len(checks)


@pytest.mark.promise("G21", "G31", "F1", "F2")
def test_output_on_stdout_reaches_the_go_host(go_host: GoHost, scratch: Path) -> None:
    directory = build_linked(ROOT / "plugins/llamacpp/plugin.yaml", scratch)
    start = directory / "lib" / "start_plugin.py"
    text = start.read_text(encoding="utf-8")
    begin = 'if __name__ == "__main__":'
    start.write_text(text.replace(begin, f"{NOISE}\n{begin}"), encoding="utf-8")
    go_host.run("stdio", executable_of(directory), scratch)


@pytest.mark.promise("G11", "G26", "G35")
def test_invalid_manifest_is_reported_to_the_go_host(go_host: GoHost, scratch: Path) -> None:
    directory = build_linked(ROOT / "plugins/llamacpp/plugin.yaml", scratch)
    executable = executable_of(directory)
    manifest = directory / "plugin.yaml"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace("type: local", "type: distant"), encoding="utf-8")
    go_host.run("broken-manifest", executable, scratch)


@pytest.mark.promise("T1")
def test_plugin_serves_its_own_manifest_in_any_working_directory(
    go_host: GoHost, plugin: Path, scratch: Path
) -> None:
    other = build_linked(ROOT / "plugins/ollama/plugin.yaml", scratch)
    go_host.run("identity", plugin, scratch, "-dir", str(other))


@pytest.mark.promise("G19", "G22", "G26", "G27", "G28", "G29", "G30", "G35")
def test_moved_plugin_directory_works_under_the_go_host(go_host: GoHost, scratch: Path) -> None:
    """Build and move the directory, then let the host install the engine, with pip and its hashes."""
    built = build(ROOT / "plugins/llamacpp/plugin.yaml", scratch / "built")
    moved = scratch / "plugins of mine" / built.name
    moved.parent.mkdir()
    built.rename(moved)
    checks = go_host.run("lifecycle", executable_of(moved), scratch)
    assert all(named(checks, name).ok for name in ("dispense", "ping", "no error in the host's log"))
    assert named(checks, "CheckEngine").detail.startswith("installed: false")
    assert str(scratch) in named(checks, "InstallEngine").detail
    assert [path.name for path in (scratch / "built").iterdir()] == []


@pytest.mark.promise("G10", "G32", "G36")
def test_plugin_and_engine_end_when_the_go_host_is_killed(go_host: GoHost, plugin: Path, scratch: Path) -> None:
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
        told = [
            name
            for process in family
            if process.ppid() != running.process.pid
            for name in process.environ()
            if name == "AOG_PLUGIN" or name.startswith("PLUGIN_")
        ]
        assert told == [], "an engine has heard what the host told the plugin alone"
        running.process.kill()
        _, alive = psutil.wait_procs(family, timeout=LIMIT)
        assert alive == []


@posix
@pytest.mark.promise("G40")
def test_go_host_reattaches_to_a_served_plugin(go_host: GoHost, scratch: Path) -> None:
    """Under `engine-plugin serve` a plugin has no cookie and no handshake line, and ends by Ctrl-C only."""
    with served(scratch) as server:
        assert server.stdout is not None
        first = server.stdout.readline()
        record = json.loads(first)  # not a handshake line
        path = record["address"].removeprefix("unix:")
        arguments = ("-server", path, "-server-pid", str(record["pid"]))
        checks = go_host.run("reattach", Path("unused"), scratch, *arguments)
        assert named(checks, "Kill does not end the plugin again").ok
        assert server.poll() is None
        server.send_signal(signal.SIGINT)
        assert server.wait(LIMIT) == 0


@contextlib.contextmanager
def served(scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `engine-plugin serve` for the default plugin, not started by a host."""
    environ = {name: value for name, value in os.environ.items() if name != "AOG_PLUGIN" and "PLUGIN_" not in name}
    command = [sys.executable, "-m", "engine_plugin.cli.main", "serve", "--json", "--plugin", str(ROOT)]
    server = subprocess.Popen(
        [*command, "--address", f"unix:{scratch}/by-hand"],
        env=environ | {"AOG_DATA_DIR": str(scratch / "data"), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    limit = threading.Timer(120, server.kill)
    limit.start()
    try:
        yield server
    finally:
        limit.cancel()
        server.kill()
        server.communicate()


def test_go_host_is_formatted_and_vetted() -> None:
    run_go("vet", "./...")
    gofmt = shutil.which("gofmt") or str(Path(run_go("env", "GOROOT").strip(), "bin", "gofmt"))
    done = subprocess.run([gofmt, "-l", "."], cwd=SOURCES, capture_output=True, text=True, check=True)
    assert done.stdout == ""
