"""Start and stop of the engine, without leftovers."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from build import build_linked
from engine_plugin.errors import EnginePluginError, InvalidRequestError, PreconditionError, UnavailableError
from engine_plugin.host import OperateStatus, PluginClient, launch
from engine_plugin.manifest import load_manifest
from engine_plugin.process.records import TOKEN_VARIABLE
from engine_plugin.transport.http1 import Http1Client
from tests.patience import LIMIT

from .running import ENDLESS, HELLO, MARK, REPOSITORY, eventually, gone, processes_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Serve

posix = pytest.mark.skipif(sys.platform == "win32", reason="unix sockets, signals and file modes")

ENDLESS_REQUEST: dict[str, Any] = {"prompt": "a", "model": ENDLESS.stem, "max_tokens": 1_000_000, "ignore_eos": True}


@pytest.mark.promise("P7")
async def test_calls_before_the_start_name_the_next_step(serve: Serve) -> None:
    running = await serve(start=False)
    client = running.client
    for attempt in (client.invoke("chat", HELLO), client.load_model("tiny-chat-gguf"), client.health_check()):
        with pytest.raises(UnavailableError, match=r"the engine is not running\. Call StartEngine"):
            await attempt
    async with client.stream("chat", HELLO) as chunks:
        with pytest.raises(UnavailableError, match="Call StartEngine"):
            await anext(chunks)
    with pytest.raises(InvalidRequestError, match=r"^messages: "):  # an invalid request is rejected in any state
        await client.invoke("chat", {})
    assert await client.running_models() == []
    with pytest.raises(PreconditionError, match="not loaded"):
        await client.unload_model("tiny-chat-gguf")
    await client.pull_model("mine", source=str(ENDLESS))
    assert "mine" in [model["name"] for model in await client.list_models()]
    await client.delete_model("mine")
    assert await client.check_engine()
    assert await client.get_version()
    assert running.processes() == []


@pytest.mark.promise("P4")
async def test_concurrent_starts_share_one_start(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await serve(start=False)
    probe = running.engine.software.probe
    probes = []

    async def counted(backend: Any) -> Any:
        probes.append(backend)
        return await probe(backend)

    monkeypatch.setattr(running.engine.software, "probe", counted)
    modes = ("", "auto", "daemon", "standard")
    await asyncio.gather(*(running.client.start_engine(modes[number % 4]) for number in range(20)))
    assert len(probes) == 1
    assert await running.client.get_operate_status() is OperateStatus.RUNNING
    assert (await running.client.health_check()).startswith("ready")


async def test_engine_starts_again_after_a_stop(serve: Serve, record_property: Callable[[str, object], None]) -> None:
    running = await serve()
    client = running.client
    times = []
    for _ in range(3):
        await asyncio.gather(client.load_model("tiny-chat-gguf"), client.load_model("tiny-embed-gguf"))
        began = time.monotonic()
        await client.stop_engine()
        times.append(time.monotonic() - began)
        assert running.processes() == []
        assert await client.get_operate_status() is OperateStatus.STOPPED
        await client.stop_engine()
        with pytest.raises(UnavailableError, match="Call StartEngine"):
            await client.invoke("chat", HELLO)
        await client.start_engine()
        assert (await client.invoke("chat", HELLO))["choices"]
    record_property("stop_ms", [round(seconds * 1000, 1) for seconds in times])
    print(f"stop of two models: {[f'{seconds * 1000:.0f} ms' for seconds in times]}")


@pytest.mark.promise("P4")
async def test_concurrent_starts_and_stops_end_in_a_valid_state(serve: Serve) -> None:
    """In any order the plugin ends stopped or serving."""
    running = await serve()
    client = running.client
    for _ in range(5):
        await client.load_model("tiny-chat-gguf")
        steps = [client.stop_engine(), client.start_engine(), client.stop_engine(), client.start_engine()]
        await asyncio.gather(*steps, return_exceptions=True)
        await client.start_engine()
        assert (await client.invoke("chat", HELLO))["choices"]
        assert running.engine.sockets is None or running.engine.sockets.is_dir()


@pytest.mark.promise("P5")
async def test_stop_ends_streams_with_the_reason(serve: Serve) -> None:
    running = await serve()
    async with running.client.stream("generate", ENDLESS_REQUEST) as chunks:
        await anext(chunks)
        asking = asyncio.create_task(running.client.invoke("generate", ENDLESS_REQUEST))
        await eventually(lambda: running.engine.pool.users(ENDLESS.stem) == 2)
        await running.client.stop_engine()
        with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
            async for _ in chunks:
                pass
    with pytest.raises(UnavailableError, match="the engine was stopped"):
        await asking
    assert running.processes() == []


@pytest.mark.promise("P4")
async def test_stop_aborts_a_load(serve: Serve) -> None:
    running = await serve()
    loading = asyncio.create_task(running.client.load_model("tiny-chat-gguf"))
    await eventually(lambda: bool(running.processes()))
    await running.client.stop_engine()
    assert running.processes() == []
    with pytest.raises(UnavailableError, match="was stopped while it was starting"):
        await loading


@pytest.mark.promise("P4")
async def test_stop_aborts_a_start(serve: Serve) -> None:
    running = await serve(start=False)
    starting = asyncio.create_task(running.client.start_engine())
    await eventually(lambda: running.engine.starting.running)
    await running.client.stop_engine()
    with suppress(UnavailableError):  # "interrupted by a stop", unless the start was quicker
        await starting
    with pytest.raises(UnavailableError, match="Call StartEngine"):
        await running.client.health_check()


async def test_mode_gpu_without_a_gpu_is_rejected(serve: Serve) -> None:
    running = await serve(start=False)
    backend = running.engine.software.find()
    devices = (await running.engine.software.probe(backend))["devices"]
    if any(device["type"] != "CPU" for device in devices):
        await running.client.start_engine("gpu")
        return
    with pytest.raises(PreconditionError, match=r"^mode: gpu was asked for, but .* sees no GPU"):
        await running.client.start_engine("gpu")
    assert await running.client.get_operate_status() is OperateStatus.ERROR
    await running.client.start_engine("cpu")
    assert await running.client.get_operate_status() is OperateStatus.RUNNING


@pytest.mark.promise("F13", "P10")
@posix
async def test_socket_directory_is_private_and_removed(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-chat-gguf")
    folder = running.engine.sockets
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(list(folder.glob("*.sock"))) == 1
    await running.client.unload_model("tiny-chat-gguf")
    assert list(folder.glob("*.sock")) == []
    await running.client.load_model("tiny-chat-gguf")
    await running.client.stop_engine()
    assert not folder.exists()


@pytest.mark.promise("F13", "P10")
async def test_key_is_in_no_argv_or_environment(serve: Serve) -> None:
    environ = {"LLAMA_ARG_CTX_SIZE": "99", "LLAMA_API_KEY": "foreign"}
    running = await serve(environ=environ)
    await running.client.load_model("tiny-chat-gguf")
    key = running.server("tiny-chat-gguf").key
    [process] = running.servers()
    assert process.pid == await running.engine_pid("tiny-chat-gguf")
    variables = process.environ()
    assert len(variables[TOKEN_VARIABLE]) == 32
    assert not any(name.startswith(("PLUGIN_", "AOG_", "LLAMA_")) for name in variables)
    assert key not in " ".join(process.cmdline())
    assert key not in " ".join(variables.values())


@pytest.mark.promise("F13")
async def test_tcp_requires_the_key(serve: Serve) -> None:
    running = await serve(transport="tcp")
    await running.client.load_model("tiny-chat-gguf")
    listening = [
        connection.laddr
        for connection in psutil.Process(await running.engine_pid("tiny-chat-gguf")).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert [address.ip for address in listening] == ["127.0.0.1"]
    stranger = Http1Client((listening[0].ip, listening[0].port))
    try:
        body = json.dumps({"prompt": "a"}).encode()
        for path in ("/v1/completions", "/slots", "/props"):
            async with stranger.request("POST", path, body) as response:
                assert response.status == 401
                await response.read(1 << 20)
    finally:
        stranger.close()
    assert (await running.client.invoke("chat", HELLO))["choices"]


@pytest.mark.promise("F11")
@posix
async def test_leftovers_of_a_killed_plugin_are_removed_at_the_next_start(serve: Serve, scratch: Path) -> None:
    """An engine process that outlived its plugin is killed, and no other process."""
    data = scratch / "data"
    leave = (
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "from engine_plugin.process.records import TOKEN_VARIABLE, ProcessRecords\n"
        "records = ProcessRecords(Path(sys.argv[1]))\n"
        "ticket = records.ticket()\n"
        "for token in (ticket.token, 'foreign'):\n"
        "    left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True,\n"
        "                            env={**os.environ, TOKEN_VARIABLE: token},\n"
        "                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "    ticket.add(left.pid)\n"
        "    print(left.pid)\n"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", leave, str(data / "run")],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    ours, foreign = (psutil.Process(int(pid)) for pid in done.stdout.split())
    try:
        await serve(data=data)
        await eventually(lambda: gone(ours))
        assert not gone(foreign)
        assert list((data / "run").glob("*.json")) == []
    finally:
        for process in (ours, foreign):
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.promise("P12")
async def test_records_exist_while_their_processes_run(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-chat-gguf")
    pid = await running.engine_pid("tiny-chat-gguf")
    assert [path.name.partition("-")[0] for path in running.engine.records.folder.glob("*.json")] == [str(pid)]
    await running.client.unload_model("tiny-chat-gguf")
    assert list(running.engine.records.folder.glob("*.json")) == []


async def launched(scratch: Path, pulled: Path) -> PluginClient:
    """The default plugin, spawned as by a host."""
    linked = build_linked(REPOSITORY / "plugins/llamacpp/plugin.yaml", scratch / "plugins")
    executable = load_manifest(linked / "plugin.yaml").executable()
    (scratch / "tmp").mkdir()
    # For the engine's sockets, which a killed plugin cannot remove.
    env = {"AOG_DATA_DIR": str(scratch / "data"), "TMPDIR": str(scratch / "tmp")}
    return await launch([str(executable)], cwd=executable.parents[1], env=env, start_timeout=LIMIT)


def family(plugin: PluginClient) -> list[psutil.Process]:
    """The engine processes of a launched plugin."""
    return [process for process in processes_of(os.environ[MARK]) if process.pid != plugin.pid]


@pytest.mark.promise("F7")
@posix
async def test_engine_ends_with_a_killed_plugin(
    scratch: Path, pulled: Path, record_property: Callable[[str, object], None]
) -> None:
    async with await launched(scratch, pulled) as plugin:
        await plugin.start_engine("daemon")
        await asyncio.gather(plugin.load_model("tiny-chat-gguf"), plugin.load_model("tiny-embed-gguf"))
        engines = family(plugin)
        assert len(engines) == 2
        for engine in engines:
            names = engine.environ()
            assert TOKEN_VARIABLE in names
            assert not any(name.startswith(("PLUGIN_", "AOG_PLUGIN")) for name in names)
        took = await kill_and_wait(plugin)
        record_property("kill_ms", round(took * 1000, 1))
        print(f"kill -9 of the plugin: no engine after {took * 1000:.0f} ms")


@pytest.mark.promise("F7")
@posix
async def test_engine_ends_with_a_plugin_killed_during_a_load(scratch: Path, pulled: Path) -> None:
    async with await launched(scratch, pulled) as plugin:
        await plugin.start_engine()
        loading = asyncio.create_task(plugin.load_model("tiny-chat-gguf"))
        await eventually(lambda: bool(family(plugin)))
        await kill_and_wait(plugin)
        with pytest.raises(EnginePluginError):
            await loading


async def kill_and_wait(plugin: PluginClient) -> float:
    """Kill the plugin; return the seconds until no engine process is left."""
    assert plugin.pid is not None
    engines = family(plugin)
    began = time.monotonic()
    psutil.Process(plugin.pid).kill()
    await eventually(lambda: all(map(gone, engines)), 3)
    took = time.monotonic() - began
    assert family(plugin) == []
    return took


@pytest.mark.promise("P1")
async def test_graceful_kill_by_the_host_leaves_nothing(scratch: Path, pulled: Path) -> None:
    async with await launched(scratch, pulled) as plugin:
        await plugin.start_engine()
        async with plugin.stream("chat", HELLO) as chunks:
            await anext(chunks)
        began = time.monotonic()
        await plugin.kill()
        print(f"the whole plugin ended in {(time.monotonic() - began) * 1000:.0f} ms")
        assert plugin.returncode == 0
        assert family(plugin) == []
    assert list((scratch / "tmp").iterdir()) == []
    assert list((scratch / "data" / "engines" / "llamacpp" / "run").glob("*.json")) == []
