"""Socket paths with every character that a directory's name may have."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from engine_plugin.host import connect, launch
from engine_plugin.server import new_server
from engine_plugin.system.addresses import grpc_target, unix_path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="unix sockets are not served on Windows")

ROOT = Path(__file__).parents[2]
NAMES = [
    *(
        "C# projects",
        "a?b=c",
        "%41",
        "%",
        "a%2Fb",
        "a b",
        "ü€",
        "a:b",
        "a@b",
        "[x]",
        "{a}",
        "\\",
        "'",
        '"',
        "<>",
        "+",
    ),
    *("a;b&c", "~x", "unix:x", "a\tb", "a\nb", "-", os.fsdecode(b"\xff")),
    pytest.param("a,b", marks=pytest.mark.skipif(sys.platform != "linux", reason="gRPC splits it at the comma")),
]


@pytest.mark.promise("L3")
@pytest.mark.parametrize("name", NAMES)
async def test_socket_in_a_directory_with_any_name_is_reached(short_dir: Path, name: str) -> None:
    path = short_dir / name / "sock"
    path.parent.mkdir()
    server = new_server()
    await server.start(f"unix:{path}")
    try:
        assert path.is_socket()
        async with await connect(f"unix:{path}"):
            pass
    finally:
        await server.stop(0)


@pytest.mark.promise("L3")
async def test_socket_at_a_relative_path_is_reached(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short_dir)
    server = new_server()
    await server.start("unix:a #b")
    try:
        assert (short_dir / "a #b").is_socket()
        async with await connect("unix:a #b"), await connect(f"unix:{short_dir}/a #b"):
            pass
    finally:
        await server.stop(0)


@pytest.mark.promise("L3")
@pytest.mark.parametrize("auto_mtls", [False, True])
async def test_plugin_in_a_directory_with_any_name_is_launched(short_dir: Path, auto_mtls: bool) -> None:
    folder = short_dir / ("C# a?b %41,c" if sys.platform == "linux" else "C# a?b %41")
    folder.mkdir()
    env = {"PLUGIN_UNIX_SOCKET_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.goplugin.plugin"]
    async with await launch(command, env=env, start_timeout=60, auto_mtls=auto_mtls):
        assert [path.name for path in folder.iterdir()]


def test_socket_path_is_escaped_for_grpc() -> None:
    assert grpc_target("127.0.0.1:80") == "127.0.0.1:80"
    assert grpc_target("unix:/a b#?%,é") == "unix:/a%20b%23%3F%25%2C%C3%A9"
    assert unix_path("unix:///a") == unix_path("unix:/a") == "/a"
    assert unix_path("unix:a") == "a"
    assert unix_path("localhost:80") is None
