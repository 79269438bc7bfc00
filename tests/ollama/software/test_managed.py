"""A server of our own: private, restarted when it dies, and gone with everything it started when we are."""

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

from engine_plugin.engines.ollama.software import Backend
from engine_plugin.errors import (
    BadGatewayError,
    EngineStartError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.process.engine_process import ProcessState
from tests.llamacpp.running import REPOSITORY, eventually, gone
from tests.ollama.contract.release import write_program
from tests.patience import LIMIT

from .place import token_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ollama.contract.handle import ContractServer

    from .place import Own, Place

HELLO = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hello"}]}


async def chat(own: Own, model: str) -> list[dict[str, Any]]:
    """The lines of one answer."""
    body = json.dumps(HELLO | {"model": model}).encode()
    async with own.server.client().request("POST", "/api/chat", body) as response:
        return [json.loads(line) for line in (await response.read(1 << 20)).splitlines()]


@pytest.mark.promise("F5", "F17")
async def test_it_starts_and_ends(place: Place) -> None:
    own = place.own("--be-version", "0.32.9")
    assert own.server.address == ""
    with pytest.raises(UnavailableError, match="our Ollama server is not up yet"):
        own.server.client()
    await asyncio.gather(*(own.server.ensure_ready() for _ in range(3)))
    assert own.server.version == "0.32.9"
    assert own.server.computes_on == ("cpu",)
    assert own.contract.ask("GET", "/api/version") == {"version": "0.32.9"}
    assert await own.server.complaint() == ""
    assert own.server.client() is own.server.client()
    assert (await chat(own, "tiny-chat"))[-1]["done"] is True
    family = [own.process, await own.load("think:8b")]
    await own.server.close()
    assert all(gone(process) for process in family)
    assert own.server.address == ""
    with pytest.raises(UnavailableError):
        own.server.client()
    with pytest.raises(UnavailableError, match="our Ollama server was stopped"):
        await own.server.ensure_ready()


@pytest.mark.promise("P11", "P21")
async def test_it_is_private(place: Place, contract_server: ContractServer, tmp_path: Path) -> None:
    """The user's server and what is meant for it are his: the address, the models, the key, the home."""
    theirs = tmp_path / "theirs"
    place.environ |= {"OLLAMA_HOST": contract_server.address, "OLLAMA_MODELS": str(theirs), "HOME": str(theirs)}
    place.environ |= {"OLLAMA_API_KEY": "secret", "OLLAMA_ORIGINS": "*", "OLLAMA_DEBUG": "1"}
    before = contract_server.ask("GET", "/api/tags")
    contract_server.forget()
    own = place.own("--bare")
    await own.server.ensure_ready()
    environ = own.process.environ()
    assert f"http://{environ['OLLAMA_HOST']}" == own.server.address != contract_server.url
    assert environ["OLLAMA_MODELS"] == str(place.data / "models")
    assert environ["HOME"] == str(place.data / "home")
    assert environ["OLLAMA_DEBUG"] == "1"
    assert not {"OLLAMA_API_KEY", "OLLAMA_ORIGINS"} & set(environ)
    assert "secret" not in str(own.contract.requests())
    assert await own.names() == []
    await own.server.client().ask("POST", "/api/pull", {"model": "fresh", "stream": False})
    assert (place.data / "models" / "manifests").is_dir()
    listeners = [connection for connection in own.process.net_connections("tcp") if connection.status == "LISTEN"]
    assert [connection.laddr.ip for connection in listeners] == ["127.0.0.1"]
    await own.server.close()
    assert contract_server.requests() == []
    assert contract_server.ask("GET", "/api/tags") == before
    assert not theirs.exists()


async def test_options_become_its_environment(place: Place) -> None:
    own = place.own(
        keep_alive="30m", context_length=8192, num_parallel=2, max_loaded_models=3, max_queue=7,
        flash_attention="on", kv_cache_type="q8_0", load_timeout="10m", no_cloud=True,
    )  # fmt: skip
    await own.server.ensure_ready()
    told = {key.removeprefix("OLLAMA_"): value for key, value in own.process.environ().items() if "OLLAMA_" in key}
    assert told.items() >= {
        "KEEP_ALIVE": "30m", "CONTEXT_LENGTH": "8192", "NUM_PARALLEL": "2", "MAX_LOADED_MODELS": "3",
        "MAX_QUEUE": "7", "FLASH_ATTENTION": "1", "KV_CACHE_TYPE": "q8_0", "LOAD_TIMEOUT": "10m", "NO_CLOUD": "1",
    }.items()  # fmt: skip


async def test_what_is_left_out_is_left_to_it(place: Place) -> None:
    place.environ["OLLAMA_KEEP_ALIVE"] = "1h"
    own = place.own(no_cloud=False)
    await own.server.ensure_ready()
    told = {key for key in own.process.environ() if key.startswith("OLLAMA_")}
    assert told == {"OLLAMA_HOST", "OLLAMA_MODELS", "OLLAMA_MAX_QUEUE", "OLLAMA_KEEP_ALIVE"}
    assert own.process.environ()["OLLAMA_KEEP_ALIVE"] == "1h"


@pytest.mark.promise("F5", "F20", "P2")
async def test_it_is_restarted_when_it_dies(place: Place) -> None:
    """With what was in its memory gone, and no process of the former life left."""
    own = place.own()
    await own.server.ensure_ready()
    dead, client = [own.process, await own.load("tiny-chat")], own.server.client()
    dead[0].kill()
    await eventually(lambda: own.server.restarts == 1 and own.server.ready)
    assert gone(dead[1])
    assert own.server.client() is not client
    assert (await own.server.client().ask("GET", "/api/ps"))["models"] == []
    assert (await chat(own, "tiny-chat"))[-1]["done"] is True
    assert "think:8b" in await own.names()
    own.process.terminate()  # by somebody who means well
    await eventually(lambda: own.server.restarts == 2 and own.server.ready)


@pytest.mark.promise("P5")
async def test_a_death_amid_an_answer_is_named(place: Place) -> None:
    own = place.own()
    await own.server.ensure_ready()
    own.contract.add("fault-stall")
    asking = asyncio.create_task(chat(own, "fault-stall"))
    await own.contract.wait("/api/chat", state="open")
    own.process.kill()
    with pytest.raises(BadGatewayError, match=r"our Ollama server died: SIGKILL"):
        await asyncio.wait_for(asking, LIMIT)


@pytest.mark.promise("P5")
async def test_a_stop_amid_an_answer(place: Place) -> None:
    own = place.own()
    await own.server.ensure_ready()
    own.contract.add("fault-stall")
    asking = asyncio.create_task(chat(own, "fault-stall"))
    await own.contract.wait("/api/chat", state="open")
    await own.server.close()
    with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
        await asyncio.wait_for(asking, LIMIT)


@pytest.mark.promise("F16")
async def test_one_that_does_not_come_up(place: Place) -> None:
    own = place.own("--fail", "no room for the kv cache")
    with pytest.raises(EngineStartError, match=r"ended during its start: exit code 1.*no room for the kv cache"):
        await own.server.ensure_ready()
    assert own.server.state is ProcessState.FAILED
    assert "no room for the kv cache" in await own.server.complaint()
    nothing = place.own(backend=Backend("", "ollama", str(place.root / "nothing")))
    with pytest.raises(EngineStartError, match=r"our Ollama server .*nothing"):
        await nothing.server.ensure_ready()


async def test_one_that_is_too_old(place: Place) -> None:
    own = place.own("--be-version", "0.4.2")
    with pytest.raises(
        PreconditionError, match=r"0\.4\.2 is too old; 0\.5\.0 or newer is needed\. Call UpgradeEngine"
    ):
        await own.server.ensure_ready()
    assert own.server.dead


@pytest.mark.parametrize(("mode", "hidden"), [("gpu", None), ("cpu", "-1")])
async def test_it_computes_where_it_should(place: Place, mode: str, hidden: str | None) -> None:
    own = place.own("--device", "CUDA", mode=mode)
    await own.server.ensure_ready()
    assert own.server.computes_on == (("cpu",) if hidden else ("cuda",))
    environ = own.process.environ()
    assert environ.get("CUDA_VISIBLE_DEVICES") == environ.get("GGML_VK_VISIBLE_DEVICES") == hidden


async def test_it_is_not_used_when_it_cannot(place: Place) -> None:
    own = place.own(mode="gpu")
    with pytest.raises(PreconditionError, match=r"mode: gpu was asked for, but .* sees no GPU \(devices: cpu\)"):
        await own.server.ensure_ready()
    own = place.own("--device", "Metal", mode="cpu")
    with pytest.raises(UnsupportedError, match=r"mode: on this machine Ollama computes on metal whatever"):
        await own.server.ensure_ready()
    assert own.server.dead


@pytest.mark.promise("F12", "F13")
async def test_a_port_that_somebody_takes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice and the bind: the next life has another one, and nothing was said to the stranger."""
    from engine_plugin.process import ports

    choose = ports.free_ports
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = stranger.getsockname()[1]
        choices = iter([(taken,)])
        monkeypatch.setattr(ports, "free_ports", lambda count: next(choices, None) or choose(count))
        own = place.own()
        await own.server.ensure_ready()
        assert own.contract.port != taken
        stranger.settimeout(0)
        said = b""
        try:
            while True:
                connection, _ = stranger.accept()
                with connection:
                    said += connection.recv(1)
        except BlockingIOError:
            pass
        assert said == b""


@pytest.mark.promise("F5", "F7", "F11", "P11")
async def test_killed_the_plugin_leaves_nothing(place: Place, contract_server: ContractServer) -> None:
    """Neither the server, nor what holds its models; the user's own server goes on."""
    program = write_program(place.root / "bin", "--runners", "--bare")
    argv = [sys.executable, "-m", "tests.ollama.software.plugin", str(place.data), str(program)]
    environ = place.environ | {"OLLAMA_HOST": contract_server.address}
    with subprocess.Popen(argv, cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE) as plugin:  # noqa: ASYNC220
        assert plugin.stdout is not None
        try:
            line = await asyncio.wait_for(asyncio.to_thread(plugin.stdout.readline), LIMIT)
            assert json.loads(line)["address"] != contract_server.url
            family = psutil.Process(plugin.pid).children(recursive=True)
            assert len(family) == 3, "the guard, the server, the process with the model"
            assert len({token_of(process) for process in family[1:]} - {""}) == 1
        finally:
            plugin.send_signal(signal.SIGKILL)
        await eventually(lambda: all(gone(process) for process in family))
    assert contract_server.process.poll() is None
    assert contract_server.requests() == []
    again = place.own("--bare")  # the next plugin finds the models, and removes what the killed one left
    await asyncio.to_thread(place.records.reap)
    await again.server.ensure_ready()
    assert await again.names() == ["fresh:latest"]
