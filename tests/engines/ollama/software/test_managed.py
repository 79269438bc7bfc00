"""The process of the managed server: environment, restarts, devices, and its end with the plugin."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.errors import (
    BadGatewayError,
    EngineStartError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.install.software import Backend
from engine_plugin.process.engine_process import ProcessState
from tests.engines.llamacpp.running import REPOSITORY, eventually, gone
from tests.engines.ollama.contract.release import write_program
from tests.patience import LIMIT

from .place import token_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engines.ollama.contract.handle import ContractServer

    from .place import Place, StartedServer

HELLO = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hello"}]}


async def chat(managed: StartedServer, model: str) -> list[dict[str, Any]]:
    """The lines of one answer."""
    body = json.dumps(HELLO | {"model": model}).encode()
    async with managed.server.client().request("POST", "/api/chat", body) as response:
        return [json.loads(line) for line in (await response.read(1 << 20)).splitlines()]


@pytest.mark.promise("F5", "F17")
async def test_start_and_stop(place: Place) -> None:
    managed = place.managed("--be-version", "0.32.9")
    assert managed.server.address == ""
    with pytest.raises(UnavailableError, match="the managed Ollama server is not up yet"):
        managed.server.client()
    await asyncio.gather(*(managed.server.ensure_ready() for _ in range(3)))
    assert managed.server.version == "0.32.9"
    assert managed.server.computes_on == ("cpu",)
    assert managed.contract.ask("GET", "/api/version") == {"version": "0.32.9"}
    assert await managed.server.complaint() == ""
    assert managed.server.client() is managed.server.client()
    assert (await chat(managed, "tiny-chat"))[-1]["done"] is True
    family = [managed.process, await managed.load("think:8b")]
    await managed.server.close()
    assert all(gone(process) for process in family)
    assert managed.server.address == ""
    with pytest.raises(UnavailableError):
        managed.server.client()
    with pytest.raises(UnavailableError, match="the managed Ollama server was stopped"):
        await managed.server.ensure_ready()


@pytest.mark.promise("P11", "P21")
async def test_users_server_and_settings_are_not_used(
    place: Place, contract_server: ContractServer, tmp_path: Path
) -> None:
    """The managed server uses neither the address nor the models, the key or the home of the user's server."""
    theirs = tmp_path / "theirs"
    place.environ |= {"OLLAMA_HOST": contract_server.address, "OLLAMA_MODELS": str(theirs), "HOME": str(theirs)}
    place.environ |= {"OLLAMA_API_KEY": "secret", "OLLAMA_ORIGINS": "*", "OLLAMA_DEBUG": "1"}
    before = contract_server.ask("GET", "/api/tags")
    contract_server.forget()
    managed = place.managed("--bare")
    await managed.server.ensure_ready()
    environ = managed.process.environ()
    assert f"http://{environ['OLLAMA_HOST']}" == managed.server.address != contract_server.url
    assert environ["OLLAMA_MODELS"] == str(place.data / "models")
    assert environ["HOME"] == str(place.data / "home")
    assert environ["OLLAMA_DEBUG"] == "1"
    assert not {"OLLAMA_API_KEY", "OLLAMA_ORIGINS"} & set(environ)
    assert "secret" not in str(managed.contract.requests())
    assert await managed.names() == []
    await managed.server.client().ask("POST", "/api/pull", {"model": "fresh", "stream": False})
    assert (place.data / "models" / "manifests").is_dir()
    listeners = [connection for connection in managed.process.net_connections("tcp") if connection.status == "LISTEN"]
    assert [connection.laddr.ip for connection in listeners] == ["127.0.0.1"]
    await managed.server.close()
    assert contract_server.requests() == []
    assert contract_server.ask("GET", "/api/tags") == before
    assert not theirs.exists()


async def test_options_become_environment_variables(place: Place) -> None:
    managed = place.managed(
        keep_alive="30m", context_length=8192, num_parallel=2, max_loaded_models=3, max_queue=7,
        flash_attention="on", kv_cache_type="q8_0", load_timeout="10m", no_cloud=True,
    )  # fmt: skip
    await managed.server.ensure_ready()
    variables = {
        key.removeprefix("OLLAMA_"): value for key, value in managed.process.environ().items() if "OLLAMA_" in key
    }
    assert variables.items() >= {
        "KEEP_ALIVE": "30m", "CONTEXT_LENGTH": "8192", "NUM_PARALLEL": "2", "MAX_LOADED_MODELS": "3",
        "MAX_QUEUE": "7", "FLASH_ATTENTION": "1", "KV_CACHE_TYPE": "q8_0", "LOAD_TIMEOUT": "10m", "NO_CLOUD": "1",
    }.items()  # fmt: skip


async def test_missing_options_are_inherited_from_the_environment(place: Place) -> None:
    place.environ["OLLAMA_KEEP_ALIVE"] = "1h"
    managed = place.managed(no_cloud=False)
    await managed.server.ensure_ready()
    variables = {key for key in managed.process.environ() if key.startswith("OLLAMA_")}
    assert variables == {"OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_MAX_QUEUE", "OLLAMA_KEEP_ALIVE"}
    assert managed.process.environ()["OLLAMA_KEEP_ALIVE"] == "1h"


@pytest.mark.promise("F5", "F20", "P2")
async def test_killed_process_is_restarted(place: Place) -> None:
    """The models are unloaded, and no process of the former run is left."""
    managed = place.managed()
    await managed.server.ensure_ready()
    dead, client = [managed.process, await managed.load("tiny-chat")], managed.server.client()
    dead[0].kill()
    await eventually(lambda: managed.server.restarts == 1 and managed.server.ready)
    assert gone(dead[1])
    assert managed.server.client() is not client
    assert (await managed.server.client().ask("GET", "/api/ps"))["models"] == []
    assert (await chat(managed, "tiny-chat"))[-1]["done"] is True
    assert "think:8b" in await managed.names()
    managed.process.terminate()  # a clean exit that the plugin did not request
    await eventually(lambda: managed.server.restarts == 2 and managed.server.ready)


@pytest.mark.promise("P5")
async def test_death_during_an_answer_is_reported(place: Place) -> None:
    managed = place.managed()
    await managed.server.ensure_ready()
    managed.contract.add("fault-stall")
    asking = asyncio.create_task(chat(managed, "fault-stall"))
    await managed.contract.wait("/api/chat", state="open")
    managed.process.kill()
    with pytest.raises(BadGatewayError, match=r"the managed Ollama server died: SIGKILL"):
        await asyncio.wait_for(asking, LIMIT)


@pytest.mark.promise("P5")
async def test_stop_during_an_answer_is_reported(place: Place) -> None:
    managed = place.managed()
    await managed.server.ensure_ready()
    managed.contract.add("fault-stall")
    asking = asyncio.create_task(chat(managed, "fault-stall"))
    await managed.contract.wait("/api/chat", state="open")
    await managed.server.close()
    with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
        await asyncio.wait_for(asking, LIMIT)


@pytest.mark.promise("F16")
async def test_failed_start_is_reported_and_leaves_nothing(place: Place) -> None:
    managed = place.managed("--fail", "no room for the kv cache")
    with pytest.raises(EngineStartError, match=r"ended during its start: exit code 1.*no room for the kv cache"):
        await managed.server.ensure_ready()
    assert managed.server.state is ProcessState.FAILED
    assert "no room for the kv cache" in await managed.server.complaint()
    nothing = place.managed(backend=Backend("ollama", "", "ollama", str(place.root / "nothing")))
    with pytest.raises(EngineStartError, match=r"the managed Ollama server .*nothing"):
        await nothing.server.ensure_ready()


async def test_too_old_release_is_rejected(place: Place) -> None:
    managed = place.managed("--be-version", "0.4.2")
    with pytest.raises(
        PreconditionError, match=r"0\.4\.2 is too old; 0\.5\.0 or newer is needed\. Call UpgradeEngine"
    ):
        await managed.server.ensure_ready()
    assert managed.server.dead


@pytest.mark.parametrize(("mode", "hidden"), [("gpu", None), ("cpu", "-1")])
async def test_mode_selects_the_device(place: Place, mode: str, hidden: str | None) -> None:
    managed = place.managed("--device", "CUDA", mode=mode)
    await managed.server.ensure_ready()
    assert managed.server.computes_on == (("cpu",) if hidden else ("cuda",))
    environ = managed.process.environ()
    assert environ.get("CUDA_VISIBLE_DEVICES") == environ.get("GGML_VK_VISIBLE_DEVICES") == hidden


async def test_mode_without_its_device_fails(place: Place) -> None:
    managed = place.managed(mode="gpu")
    with pytest.raises(PreconditionError, match=r"mode: gpu was asked for, but .* sees no GPU \(devices: cpu\)"):
        await managed.server.ensure_ready()
    managed = place.managed("--device", "Metal", mode="cpu")
    with pytest.raises(UnsupportedError, match=r"mode: on this machine Ollama always computes on metal"):
        await managed.server.ensure_ready()
    assert managed.server.dead


@pytest.mark.promise("F12", "F13")
async def test_port_taken_before_bind_is_replaced(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is taken between choice and bind:

    the next run has another one, and the other program gets no request.
    """
    from engine_plugin.process import ports

    choose = ports.free_ports
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        choices = iter([(taken,)])
        monkeypatch.setattr(ports, "free_ports", lambda count: next(choices, None) or choose(count))
        managed = place.managed()
        await managed.server.ensure_ready()
        assert managed.contract.port != taken
        stranger.settimeout(0)
        received = b""
        try:
            while True:
                connection, _ = stranger.accept()
                with connection:
                    received += connection.recv(1)
        except BlockingIOError:
            pass
        assert received == b""


@pytest.mark.promise("F5", "F7", "F11", "P11")
async def test_killed_plugin_leaves_no_process(place: Place, contract_server: ContractServer) -> None:
    """Neither the server nor its runners are left; the user's server keeps running."""
    program = write_program(place.root / "bin", "--runners", "--bare")
    argv = [sys.executable, "-m", "tests.engines.ollama.software.plugin", str(place.data), str(program)]
    environ = place.environ | {"OLLAMA_HOST": contract_server.address}
    with subprocess.Popen(argv, cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE) as plugin:  # noqa: ASYNC220
        assert plugin.stdout is not None
        try:
            line = await asyncio.wait_for(asyncio.to_thread(plugin.stdout.readline), LIMIT)
            assert json.loads(line)["address"] != contract_server.url
            family = psutil.Process(plugin.pid).children(recursive=True)
            assert len(family) == 3, "the guard, the server, the runner of the model"
            assert len({token_of(process) for process in family[1:]} - {""}) == 1
        finally:
            plugin.send_signal(signal.SIGKILL)
        await eventually(lambda: all(gone(process) for process in family))
    assert contract_server.process.poll() is None
    assert contract_server.requests() == []
    again = place.managed("--bare")  # the next plugin finds the models, and removes the leftovers of the killed one
    await asyncio.to_thread(place.records.reap)
    await again.server.ensure_ready()
    assert await again.names() == ["fresh:latest"]
