"""The choice between the two implementations of gRPC."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from engine_plugin.errors import EnginePluginError
from engine_plugin.host.channel import open_channel
from engine_plugin.rpc import choice
from engine_plugin.server import new_server

BOTH = """\
import asyncio, sys
from engine_plugin.host.channel import open_channel
from engine_plugin.server import new_server
async def main():
    new_server()
    await open_channel("unix:/nowhere").close()
asyncio.run(main())
print(*{"ngh2", "grpc"} & set(sys.modules))
"""


@pytest.mark.parametrize(("variable", "loaded"), [("", "ngh2"), ("native", "ngh2"), ("grpcio", "grpc")])
def test_only_the_chosen_implementation_is_loaded(
    variable: str, loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_PLUGIN_GRPC", variable)
    done = subprocess.run([sys.executable, "-c", BOTH], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == loaded


WITHOUT_THE_CORE = """\
import asyncio, sys
sys.modules["ngh2"] = None
from engine_plugin.goplugin.relay import RelayingTlsServer
from engine_plugin.host.channel import open_channel
from engine_plugin.server import new_server
async def main():
    new_server()
    RelayingTlsServer(frozenset(), "")
    await open_channel("unix:/nowhere").close()
asyncio.run(main())
"""


def test_grpcio_serves_hosts_with_and_without_tls_where_the_core_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ENGINE_PLUGIN_GRPC", "grpcio")
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_CORE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    def find(name: str) -> Any:
        return None if name in missing else importlib.util.find_spec(name)

    monkeypatch.setattr(choice, "find_spec", find)


def test_grpcio_is_used_where_the_core_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENGINE_PLUGIN_GRPC", raising=False)
    without(monkeypatch, "ngh2")
    assert choice.use_grpcio()


@pytest.mark.parametrize(("variable", "missing"), [("native", "ngh2"), ("grpcio", "grpc"), ("", "ngh2 grpc")])
def test_missing_package_is_named(variable: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_PLUGIN_GRPC", variable)
    without(monkeypatch, *missing.split())
    with pytest.raises(EnginePluginError, match=f"pip install {'ngh2' if variable == 'native' else 'grpcio'}$"):
        new_server()


def test_unknown_choice_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_PLUGIN_GRPC", "grpclib")
    with pytest.raises(EnginePluginError, match=r"ENGINE_PLUGIN_GRPC is 'grpclib'. Set it to native or grpcio"):
        open_channel("unix:/nowhere")
