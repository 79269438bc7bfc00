"""Launching with AutoMTLS: a plugin that supports it, and wrong certificates."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import PluginProcessError, UnavailableError
from engine_plugin.host import PluginRegistry, connect, launch
from engine_plugin.host.handshake import parse_handshake
from tests.patience import LIMIT, pace

from .conftest import REPOSITORY, Launch
from .plugins import make_plugin
from .test_launch import no_children

if TYPE_CHECKING:
    from pathlib import Path

PLUGIN = REPOSITORY / "tests" / "goplugin" / "plugin.py"


def contents(directory: Path) -> list[Path]:
    return list(directory.iterdir())


@pytest.mark.promise("G7", "G13", "G37")
@pytest.mark.parametrize("transport", ["", "tcp"])
async def test_plugin_with_tls_is_launched_and_called(sockets: Path, transport: str) -> None:
    env = {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(sockets), "ENGINE_PLUGIN_TRANSPORT": transport}
    async with await launch([sys.executable, str(PLUGIN)], env=env, start_timeout=LIMIT, auto_mtls=True) as plugin:
        assert await plugin.invoke_raw("echo", b"8388608") == b'"' + b"y" * 8388608 + b'"'
        with pytest.raises(UnavailableError):
            await connect(plugin.address, timeout=pace(0.5))
    assert plugin.returncode == 0
    assert no_children()
    assert contents(sockets) == []


async def test_registry_launches_with_auto_mtls(tmp_path: Path, sockets: Path) -> None:
    make_plugin(tmp_path, "fake", program=PLUGIN)
    registry = PluginRegistry.discover(tmp_path)
    env = {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(sockets)}
    async with await registry.launch("fake", env=env, start_timeout=LIMIT, auto_mtls=True) as plugin:
        assert await plugin.invoke_raw("echo", b"1") == b'"y"'


@pytest.mark.promise("G13", "G14", "G37")
@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("normal", "no TLS certificate in the handshake line"),
        ("not-base64", "the TLS certificate is not valid base64"),
        ("certificate", "not a valid TLS certificate"),
        ("another-certificate", "cannot be reached at"),
    ],
)
async def test_missing_or_wrong_certificate_fails_the_launch(
    launch_fake: Launch, sockets: Path, mode: str, told: str
) -> None:
    """It is missing, damaged, or not that of the server at the address."""
    with pytest.raises(PluginProcessError, match=re.escape(told)):
        await launch_fake(mode, auto_mtls=True)
    assert no_children()


@pytest.mark.promise("G13", "G14")
def test_certificate_is_read_with_or_without_padding() -> None:
    for text in ("//8", "//8="):
        assert parse_handshake(f"1|1|unix|/x|grpc|{text}\n", auto_mtls=True).certificate == b"\xff\xff"
    assert parse_handshake("1|1|unix|/x|grpc|\n").certificate == b""
    with pytest.raises(PluginProcessError, match="unexpected TLS certificate"):
        parse_handshake("1|1|unix|/x|grpc|//8\n")
