"""The Ollama plugin under a real go-plugin host, in AOG's flavors. The checks: tests/conformance/host/ollama.go."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import yaml

from build import build_linked
from pins import ROOT
from tests.conformance.gohost import executable_of
from tests.engines.ollama.contract.handle import ContractServer
from tests.engines.ollama.contract.release import members
from tests.install.packing import pack
from tests.patience import LIMIT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conformance.gohost import Check, GoHost

pytestmark = pytest.mark.slow

if shutil.which("go") is None:
    pytest.skip("Go is not installed: the Go host was not run", allow_module_level=True)

NOWHERE = "127.0.0.1:9"
NATIVE = {"chat", "generate", "embed"}

posix = pytest.mark.skipif(sys.platform == "win32", reason="the contract server as a program is a script")


def ollama_plugin(folder: Path, *, native: bool = False, **options: Any) -> Path:
    """Return the executable of the shipped plugin with these options; with `native`, requests are Ollama JSON."""
    source = ROOT / "plugins/ollama/plugin.yaml"
    shape = yaml.safe_load(source.read_text(encoding="utf-8"))
    shape["engine"] |= options
    for service in shape["services"]:
        if native and service["service_name"] in NATIVE:
            service["config_ref"] = f"ollama:{service['service_name']}"
    manifest = folder / "plugin.yaml"
    manifest.write_text(yaml.safe_dump(shape, sort_keys=False), encoding="utf-8")
    return executable_of(build_linked(manifest, folder / "plugins"))


def managed_plugin(folder: Path) -> Path:
    """Return a plugin with a managed Ollama, the contract server with a process for each loaded model."""
    archive = pack(folder / "ollama.tgz", members("--runners", "--bare"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return ollama_plugin(folder, server="manage", archives=[{"url": str(archive), "sha256": digest}])


def names(checks: list[Check]) -> list[str]:
    return [check.name for check in checks]


@pytest.mark.promise("F23", "G20", "G34", "P32")
@pytest.mark.parametrize("native", [False, True], ids=["openai", "native"])
def test_attached_server_is_used_and_outlives_the_plugin(go_host: GoHost, scratch: Path, native: bool) -> None:
    executable = ollama_plugin(scratch, native=native)
    server = ContractServer(scratch / "models")
    try:
        checks = go_host.run("ollama", executable, scratch, OLLAMA_HOST=server.address)
        [manifest] = [check for check in checks if check.name == "GetManifest"]
        assert ("ollama:chat" if native else "openai:chat") in manifest.detail
        assert server.process.poll() is None
        [endless] = [each for each in server.requests("/api/chat") if "endless" in each["body"]["model"]]
        assert asyncio.run(server.wait("/api/chat", state="left"))["body"] == endless["body"]
    finally:
        server.close()


@pytest.mark.promise("F5", "G20", "G34")
@posix
@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["plain", "tls"])
def test_managed_server_ends_with_kill(go_host: GoHost, scratch: Path, tls: bool) -> None:
    arguments = ["-automtls"] if tls else []
    checks = go_host.run("ollama-managed", managed_plugin(scratch), scratch, *arguments, OLLAMA_HOST=NOWHERE)
    assert {"InstallEngine", "LoadModel again", "the server is gone"} <= set(names(checks))


@pytest.mark.promise("F5", "F7")
@posix
def test_managed_server_ends_when_the_plugin_is_killed(go_host: GoHost, scratch: Path) -> None:
    with go_host.start("ollama-hold", managed_plugin(scratch), scratch, OLLAMA_HOST=NOWHERE) as running:
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
        [plugin] = [process for process in family if process.ppid() == running.process.pid]
        assert len(family) >= 4, "the plugin, the guard, the server and a model's process"
        plugin.kill()
        assert running.process.wait(LIMIT) == 0
        _, alive = psutil.wait_procs(family, timeout=LIMIT)
        assert alive == []
