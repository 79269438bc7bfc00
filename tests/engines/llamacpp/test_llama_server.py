"""A llama-server binary instead of xllamacpp: detection, arguments and end."""

from __future__ import annotations

import json
import re
import shutil
import stat
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.engines.llamacpp.server import LlamaServerSettings, server_command
from engine_plugin.errors import EnginePluginError, InstallError, PreconditionError, UnavailableError
from engine_plugin.install.software import Backend

from .running import HELLO

if TYPE_CHECKING:
    from .conftest import Serve

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")

SHIM = Path(__file__).with_name("shim.py")


@pytest.fixture
def llama_server(scratch: Path) -> Path:
    """A directory with an executable called llama-server."""
    path = scratch / "bin" / "llama-server"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n{SHIM.read_text()}")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("transport", ["unix", "tcp"])
async def test_each_service_is_answered(serve: Serve, llama_server: Path, transport: str) -> None:
    running = await serve(backend="llama-server", llama_server=str(llama_server), transport=transport)
    client = running.client
    assert (await client.check_engine()).detail.startswith(f"llama-server at {llama_server}")
    assert await client.get_version() == "b1234"
    assert (await client.invoke("chat", HELLO))["choices"][0]["message"]["content"].startswith("Hello")
    assert len((await client.invoke("embed", {"input": "a"}))["data"][0]["embedding"]) == 64
    assert (await client.invoke("rerank", {"query": "a", "documents": ["a", "b"], "top_n": 1}))["results"]
    async with client.stream("chat", HELLO) as chunks:
        assert b"".join([chunk async for chunk in chunks]).endswith(b"data: [DONE]\n\n")
    [process] = psutil.Process(await running.engine_pid("tiny-chat-gguf")).children()  # of the guard
    assert str(llama_server) in process.cmdline()
    assert process.children() == []
    key = running.server("tiny-chat-gguf").key
    assert key not in " ".join([*process.cmdline(), *process.environ().values()])
    left = [*running.engine.data.rglob("*.key"), *(running.engine.sockets or scratch_of(running)).rglob("*.key")]
    assert left == []
    await client.stop_engine()
    assert running.processes() == []


def scratch_of(running: Any) -> Path:
    data: Path = running.engine.data
    return data


async def test_llama_server_on_path_is_found(serve: Serve, llama_server: Path) -> None:
    running = await serve(backend="auto", environ={"PATH": str(llama_server.parent)})
    assert (await running.client.check_engine()).detail.startswith(f"llama-server at {llama_server}")
    assert (await running.client.invoke("chat", HELLO))["choices"]
    assert "nothing to upgrade" in await running.client.upgrade_engine()


async def test_missing_llama_server_is_reported(serve: Serve, scratch: Path) -> None:
    running = await serve(start=False, backend="llama-server", environ={"PATH": str(scratch)})
    check = await running.client.check_engine()
    assert not check
    assert check.detail == "no llama-server: none on PATH"
    with pytest.raises(PreconditionError, match="no llama-server: none on PATH"):
        await running.client.start_engine()
    with pytest.raises(EnginePluginError, match=r"does not install the backend that plugin\.yaml selects") as refused:
        await running.client.install_engine()
    assert refused.value.code == InstallError.code


@pytest.mark.parametrize("backend", ["auto", "llama-server"])
async def test_named_but_missing_program_is_an_error(serve: Serve, scratch: Path, backend: str) -> None:
    """No other llama.cpp is used than the one that plugin.yaml names."""
    absent = scratch / "absent" / "llama-server"
    running = await serve(start=False, backend=backend, llama_server=str(absent))
    check = await running.client.check_engine()
    assert not check
    assert str(absent) in check.detail
    with pytest.raises(PreconditionError, match=re.escape(str(absent))):
        await running.client.start_engine()


async def test_program_that_fails_is_reported_with_the_reason(serve: Serve, scratch: Path) -> None:
    broken = scratch / "llama-server"
    broken.write_text("#!/bin/sh\necho 'libcuda.so.1 is missing' >&2\nexit 127\n")
    broken.chmod(0o755)
    running = await serve(start=False, llama_server=str(broken), backend="auto")
    with pytest.raises(UnavailableError, match=r"does not run \(exit code 127\): libcuda.so.1 is missing"):
        await running.client.start_engine()


@pytest.mark.promise("P10")
async def test_failed_load_leaves_no_key_file(serve: Serve, llama_server: Path) -> None:
    running = await serve(backend="llama-server", llama_server=str(llama_server), transport="tcp")
    model = running.engine.store.root / "tiny-random.gguf"
    times = model.stat()
    model.write_bytes(b"GGUF" + b"\xff" * (times.st_size - 4))
    import os

    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UnavailableError, match="ended during its start: exit code 1"):
        await running.client.load_model("tiny-random")
    assert list(running.engine.data.rglob("*.key")) == []
    assert running.processes() == []


def settings(**changes: Any) -> LlamaServerSettings:
    plain: dict[str, Any] = {
        "model": "/m.gguf",
        "alias": "m",
        "kind": "embed",
        "pooling": "MEAN",
        "host": "/run/x.sock",
        "port": 8080,
        "key": "secret",
        "context_length": 512,
        "parallel": 2,
        "threads": 1,
        "gpu_layers": 0,
    }
    return LlamaServerSettings(**plain | changes)


def test_llama_cpp_accepts_each_argument(tmp_path: Path) -> None:
    """Checked with llama.cpp's argument parser in xllamacpp."""
    backend = Backend("llama-server", "", "", executable="llama-server")
    argv = server_command(backend, settings(), tmp_path / "key")
    flags = {word.encode() for word in argv[argv.index("llama-server") :] if word.startswith("--")}
    assert len(flags) > 15
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    [library] = [
        path for path in Path(spec.submodule_search_locations[0]).iterdir() if path.suffix in (".so", ".pyd")
    ]
    binary = library.read_bytes()
    assert {flag for flag in flags if b"\0" + flag + b"\0" not in binary} == set()


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, ["--embedding", "--pooling", "mean", "--threads", "--n-gpu-layers"], []),
        ({"kind": "chat", "pooling": ""}, ["--jinja"], ["--embedding", "--pooling", "--batch-size"]),
        ({"kind": "rerank", "pooling": "RANK"}, ["--embedding", "rank"], []),
        ({"threads": 0, "gpu_layers": -1, "pooling": ""}, ["--embedding"], ["--threads", "--n-gpu-layers"]),
    ],
)
def test_arguments_follow_the_settings(
    tmp_path: Path, changes: dict[str, Any], present: list[str], absent: list[str]
) -> None:
    argv = server_command(Backend("llama-server", "", "", executable="x"), settings(**changes), tmp_path / "key")
    assert set(present) <= set(argv)
    assert not set(absent) & set(argv)
    assert "secret" not in json.dumps(argv)


def test_stand_in_is_executable(llama_server: Path) -> None:
    assert stat.S_IMODE(llama_server.stat().st_mode) == 0o755
    assert shutil.which("llama-server", path=str(llama_server.parent)) == str(llama_server)
