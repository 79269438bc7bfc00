"""Loads, evictions and unloads of models in memory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import http.server
import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import (
    EnginePluginError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.host import events
from tests.patience import LIMIT

from .running import ENDLESS, HELLO, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Serve
    from .running import RunningPlugin


async def count_stream(running: RunningPlugin, request: dict[str, object], started: asyncio.Event) -> int:
    """Read a stream and count its events. `started` is set at the first one."""
    count = 0
    async with running.client.stream("generate", request) as chunks:
        async for _ in events(chunks):
            count += 1
            started.set()
    return count


@pytest.mark.promise("F18")
async def test_concurrent_first_calls_load_once(serve: Serve) -> None:
    running = await serve(parallel=8)
    answers = await asyncio.gather(
        *(running.client.invoke("chat", HELLO) for _ in range(6)),
        *(running.client.load_model("tiny-chat-gguf") for _ in range(6)),
    )
    assert sum(answer is not None for answer in answers) == 6
    assert len(running.servers()) == 1
    assert await running.loaded() == ["tiny-chat-gguf"]


@pytest.mark.promise("H9")
async def test_sample_answers_to_its_former_name(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-chat")
    assert (await running.client.invoke("chat", HELLO | {"model": "tiny-chat"}))["model"] == "tiny-chat-gguf"
    assert await running.loaded() == ["tiny-chat-gguf"]
    await running.client.unload_model("tiny-chat")
    assert await running.loaded() == []


@pytest.mark.promise("F19")
async def test_second_model_evicts_the_first_after_its_stream(serve: Serve) -> None:
    running = await serve(max_loaded_models=1)
    model = ENDLESS.stem
    started = asyncio.Event()
    request: dict[str, object] = {"prompt": "a", "model": model, "max_tokens": 200, "ignore_eos": True}
    streaming = asyncio.create_task(count_stream(running, request, started))
    await started.wait()
    embedding = await running.client.invoke("embed", {"input": "a"})
    assert embedding["data"]
    assert streaming.done()
    assert await streaming >= 200
    assert await running.loaded() == ["tiny-embed-gguf"]
    assert len(running.servers()) == 1


async def test_least_recently_used_model_is_evicted(serve: Serve) -> None:
    running = await serve(max_loaded_models=2)
    await running.client.load_model("tiny-chat-gguf")
    await running.client.load_model("tiny-embed-gguf")
    await running.client.invoke("chat", HELLO)
    await running.client.invoke("rerank", {"query": "a", "documents": ["a"]})
    assert await running.loaded() == ["tiny-chat-gguf", "tiny-rerank-gguf"]


async def test_more_models_than_fit_are_served_in_turn(serve: Serve) -> None:
    """Each call is answered, although its model takes the place of another."""
    running = await serve(max_loaded_models=1)
    asked = (
        ("chat", HELLO),
        ("embed", {"input": "a"}),
        ("rerank", {"query": "a", "documents": ["a"]}),
    )
    async with asyncio.timeout(LIMIT):
        answers = await asyncio.gather(*(running.client.invoke(*asked[number % 3]) for number in range(9)))
    assert len(answers) == 9
    assert len(running.servers()) == 1


@pytest.mark.promise("F19", "P5")
async def test_stream_beyond_the_drain_timeout_ends_with_the_reason(serve: Serve) -> None:
    running = await serve(max_loaded_models=1, drain_timeout=0.3)
    model = ENDLESS.stem
    started = asyncio.Event()
    request: dict[str, object] = {"prompt": "a", "model": model, "max_tokens": 1_000_000, "ignore_eos": True}
    streaming = asyncio.create_task(count_stream(running, request, started))
    await started.wait()
    await running.client.load_model("tiny-embed-gguf")
    with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
        await streaming


@pytest.mark.promise("P8")
async def test_full_queue_rejects_calls(serve: Serve) -> None:
    running = await serve(parallel=1, max_queue=1)
    model = ENDLESS.stem
    endless = {"prompt": "a", "model": model, "max_tokens": 1_000_000, "ignore_eos": True}
    async with running.client.stream("generate", endless) as chunks:
        await anext(chunks)
        waiting = asyncio.create_task(running.client.invoke("generate", {**endless, "max_tokens": 1}))
        await eventually(lambda: running.server(model).admission.waiting == 1)
        with pytest.raises(UnavailableError, match=r"the model is busy: 1 requests wait already \(engine.max_queue"):
            await running.client.invoke("generate", endless)
        async with running.client.stream("generate", endless) as refused:
            with pytest.raises(UnavailableError, match="the model is busy"):
                await anext(refused)
    assert (await waiting)["choices"]


async def test_models_are_loaded_and_unloaded(serve: Serve) -> None:
    running = await serve()
    client = running.client
    await client.load_model("tiny-chat-gguf")
    pid = await running.engine_pid("tiny-chat-gguf")
    await client.load_model("tiny-chat-gguf")
    assert await running.engine_pid("tiny-chat-gguf") == pid
    await client.load_model("tiny-embed-gguf")
    assert await running.loaded() == ["tiny-chat-gguf", "tiny-embed-gguf"]
    await client.unload_model("tiny-chat-gguf", "tiny-embed-gguf")
    assert await running.loaded() == []
    assert running.processes() == []
    with pytest.raises(PreconditionError, match=r"^models: tiny-chat-gguf is not loaded$"):
        await client.unload_model("tiny-chat-gguf")
    with pytest.raises(NotFoundError, match=r"^model: no model is called 'nope'"):
        await client.load_model("nope")
    with pytest.raises(NotFoundError, match=r"no model is called 'nope'"):
        await client.unload_model("nope")


async def test_failed_unload_does_not_hide_the_others(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-chat-gguf")
    with pytest.raises(PreconditionError, match="tiny-embed-gguf is not loaded"):
        await running.client.unload_model("tiny-embed-gguf", "tiny-chat-gguf")
    # The answer arrives after the other model has drained.
    assert await running.loaded() == []
    assert running.processes() == []


@pytest.mark.promise("F19")
async def test_unload_waits_for_requests(serve: Serve) -> None:
    running = await serve()
    model = ENDLESS.stem
    started = asyncio.Event()
    request: dict[str, object] = {"prompt": "a", "model": model, "max_tokens": 200, "ignore_eos": True}
    streaming = asyncio.create_task(count_stream(running, request, started))
    await started.wait()
    await running.client.unload_model(model)
    assert streaming.done()
    assert await streaming >= 200


@pytest.mark.promise("F22")
async def test_loading_model_is_not_listed_as_running(serve: Serve) -> None:
    running = await serve()
    loading = asyncio.create_task(running.client.load_model("tiny-chat-gguf"))
    await eventually(lambda: bool(running.engine.pool.all_servers()))
    assert await running.loaded() == []
    assert (await running.client.health_check()).startswith("ready")
    await loading
    assert await running.loaded() == ["tiny-chat-gguf"]


async def test_models_are_deleted(serve: Serve) -> None:
    running = await serve()
    client = running.client
    model = ENDLESS.stem
    endless = {"prompt": "a", "model": model, "max_tokens": 1_000_000, "ignore_eos": True}
    async with client.stream("generate", endless) as chunks:
        await anext(chunks)
        with pytest.raises(PreconditionError, match=f"^model: {model} is answering 1 requests"):
            await client.delete_model(model)
    await eventually(lambda: running.engine.pool.users(model) == 0)
    assert await running.loaded() == [model]
    await client.delete_model(model)
    assert await running.loaded() == []
    assert model not in [entry["name"] for entry in await client.list_models()]
    assert running.processes() == []
    with pytest.raises(NotFoundError, match=r"^model: no model is called"):
        await client.delete_model(model)
    half = running.engine.data / "models" / ".partial" / f"{model}.part"
    half.write_bytes(b"GGUF")
    await client.delete_model(model)
    assert not half.exists(), "the remains of an unfinished pull are deleted too"
    await client.load_model("tiny-chat-gguf")
    with pytest.raises(PreconditionError, match="comes with the plugin's package"):
        await client.delete_model("tiny-chat-gguf")
    assert await running.loaded() == ["tiny-chat-gguf"]


async def test_models_are_pulled_from_each_source(serve: Serve, scratch: Path) -> None:
    running = await serve()
    client = running.client
    with file_server(ENDLESS.parent) as url:
        steps = [step async for step in client.pull_model_stream("other", source=f"{url}/{ENDLESS.name}")]
    assert steps[-1]["status"] == "success"
    assert steps[-1]["total"] == ENDLESS.stat().st_size
    await client.pull_model("mine", source=str(ENDLESS))
    await client.pull_model("tiny-chat-gguf")  # a sample needs no download
    by_name = {entry["name"]: entry for entry in await client.list_models()}
    assert {"other", "mine", "tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf"} <= set(by_name)
    assert by_name["mine"]["details"]["family"] == "llama"
    assert (await client.invoke("generate", {"model": "mine", "prompt": "a", "max_tokens": 2}))["model"] == "mine"
    assert (await client.invoke("generate", {"model": "tiny-chat-gguf", "prompt": "a", "max_tokens": 2}))["choices"]


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """A plain HTTP server of a folder on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, directory=str(folder), **options)  # type: ignore[arg-type]  # passed on

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def damaged(source: Path, target: Path, how: str) -> Path:
    """A damaged copy of a model."""
    data = source.read_bytes()
    if how == "cut":
        target.write_bytes(data[: len(data) // 2])
    elif how == "text":
        target.write_bytes(b"this is no model\n" * 100)
    elif how == "empty":
        target.write_bytes(b"")
    elif how == "header":
        target.write_bytes(data[:24] + b"\xff" * 200 + data[224:])
    return target


@pytest.mark.promise("P18")
@pytest.mark.parametrize("how", ["cut", "text", "empty", "header"])
async def test_damaged_file_is_rejected(serve: Serve, scratch: Path, how: str) -> None:
    running = await serve()
    before = [entry["name"] for entry in await running.client.list_models()]
    broken = damaged(ENDLESS, scratch / "broken.gguf", how)
    with pytest.raises(EnginePluginError, match=r"broken.*(not a|empty|truncated|0 bytes)"):
        await running.client.pull_model(str(broken))
    assert [entry["name"] for entry in await running.client.list_models()] == before
    assert [path.stem for path in running.engine.store.root.glob("*.gguf")] == [ENDLESS.stem]
    assert [path for path in (running.engine.store.root / ".partial").glob("*") if path.stat().st_size] == []


@pytest.mark.promise("S12")
async def test_model_damaged_after_the_pull_fails_with_llama_cpps_reason(serve: Serve) -> None:
    running = await serve()
    model = ENDLESS.stem
    stored = running.engine.store.root / f"{model}.gguf"
    info = stored.stat()
    data = bytearray(stored.read_bytes())
    cut = len(data) // 2
    # As after a disk failure: size and time are unchanged.
    stored.write_bytes(bytes(data[:4]) + b"\xff" * cut + bytes(data[cut + 4 :]))
    os.utime(stored, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(PreconditionError, match=rf"llama.cpp for {model} ended during its start: exit code 65.* E "):
        await running.client.load_model(model)
    assert running.processes() == []
    assert await running.loaded() == []
    with pytest.raises(PreconditionError, match=r"ended during its start.*pull it again"):
        await running.client.invoke("generate", {"model": model, "prompt": "a"})
    shutil.copyfile(ENDLESS, stored)
    assert (await running.client.invoke("generate", {"model": model, "prompt": "a", "max_tokens": 1}))["choices"]


async def test_unsupported_service_is_rejected(serve: Serve) -> None:
    def declare(shape: dict[str, object]) -> None:
        services = shape["services"]
        assert isinstance(services, list)
        services.append(
            copy.deepcopy(services[0]) | {"service_name": "text-to-image", "config_ref": "", "default_model": ""}
        )
        del services[2]

    running = await serve(change=declare)
    with pytest.raises(EnginePluginError, match="llamacpp does not support text-to-image") as unsupported:
        await running.client.invoke("text-to-image", {"prompt": "a"})
    assert unsupported.value.code == 501
    with pytest.raises(NotFoundError, match="no service 'embed'; it declares: chat, generate, rerank"):
        await running.client.invoke("embed", {"input": "a"})
    with pytest.raises(InvalidRequestError, match=r"^service_name: is empty"):
        await running.client.invoke("", {})
