"""Reloads of config.json."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from tests.openvino_server.serving.test_calls import HELD
from tests.patience import LIMIT

if TYPE_CHECKING:
    from tests.openvino_server.serving.conftest import Front, Serve


async def pid(front: Front, model: str = "m") -> int:
    """Of the model's worker."""
    async with front.registry.models[model].use() as worker:
        return worker.pid


async def test_unchanged_model_keeps_its_worker(serve: Serve) -> None:
    front = await serve()
    before = await pid(front)
    assert await front.reload() == 200
    front.config.add("owner/name")
    assert await front.reload() == 201
    assert await pid(front) == before
    assert (await front.chat(model="owner/name"))[0] == 200


async def test_changed_entry_gets_a_new_worker(serve: Serve) -> None:
    front = await serve()
    before = await pid(front)
    front.config.add("m", device="GPU.1", options={"max_num_seqs": 3})
    assert await front.reload() == 201
    assert await pid(front) != before


async def test_removed_model_ends_its_calls_first_and_rejects_new_ones(serve: Serve) -> None:
    front = await serve()
    async with front.streaming(script=HELD) as held:
        await asyncio.wait_for(held.content.readany(), LIMIT)
        async with front.registry.models["m"].use() as worker:
            before = worker.pid
        front.config.models.clear()
        removal = asyncio.create_task(front.reload())
        async with asyncio.timeout(LIMIT):
            while (await front.state("m"))[0] != "UNLOADING":
                pass
        assert (await front.chat())[0] == 404
        assert not removal.done()
        await worker.ask({"op": "chat", "params": {"script": {"release": True}}})
        assert (await asyncio.wait_for(held.content.read(), LIMIT)).endswith(b"data: [DONE]\n\n")
    assert await asyncio.wait_for(removal, LIMIT) == 201
    assert (await front.get("/v1/config"))[1] == {}
    assert not alive(before)


async def test_calls_are_cancelled_after_the_drain_timeout(serve: Serve) -> None:
    front = await serve(drain_timeout=0.05)
    async with front.streaming(script=HELD) as held:
        await asyncio.wait_for(held.content.readany(), LIMIT)
        front.config.models.clear()
        assert await front.reload() == 201
        assert b"was unloaded" in await asyncio.wait_for(held.content.read(), LIMIT)


async def test_failed_load_is_reported_and_the_other_models_answer(serve: Serve) -> None:
    front = await serve()
    before = await pid(front)
    for way, word in (("fail", "no such luck"), ("crash", "libvery.so: cannot open"), ("noise", "not a frame")):
        front.config.add(way, load=way)
        front.config.write()
        status, answer = await front.post("/v1/config/reload")
        assert status == 500
        assert f"{way}: " in answer["error"]
        assert word in answer["error"]
        state, reason = await front.state(way)
        assert state == "END"
        assert word in reason
        status, answer = await front.chat(model=way)
        assert status == 503
        assert word in answer["error"]["message"]
        del front.config.models[way]
    assert await front.reload() == 201
    assert await pid(front) == before


@pytest.mark.promise("U8")
async def test_load_that_lacks_memory_is_not_blamed_on_the_files(serve: Serve) -> None:
    """C++'s bad_alloc reaches Python as another exception."""
    front = await serve(empty=True)
    front.config.add("m", load="fail", text="Exception from src/core.cpp: std::bad_alloc")
    assert await front.reload() == 500
    assert "bad_alloc. It got too little memory: " in (await front.state("m"))[1]
    assert not front.registry.models["m"].unusable


async def test_reload_retries_a_failed_model(serve: Serve) -> None:
    front = await serve(empty=True)
    front.config.add("m", load="fail")
    assert await front.reload() == 500
    (front.config.root / "models" / "m" / "script.json").write_text("{}")
    assert await front.reload() == 201
    assert (await front.chat())[0] == 200


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"models": [{}]}',
        '{"models": [{"name": "m", "kind": "chat", "folder": "."}, {"name": "m", "kind": "chat", "folder": "."}]}',
        '{"models": [{"name": "m", "kind": "chat", "folder": 7}]}',
        '{"models": [{"name": "m", "kind": "chat", "folder": ".", "options": []}]}',
        '{"models": [{"name": "m", "kind": "chat", "folder": ".", "graph_path": "graph.pbtxt"}]}',
        '{"mediapipe_config_list": [], "model_config_list": []}',
    ],
)
async def test_invalid_configuration_changes_nothing(serve: Serve, text: str) -> None:
    front = await serve()
    front.config.path.write_text(text)
    status, answer = await front.post("/v1/config/reload")
    assert status == 400
    assert "config.json" in answer["error"]
    assert (await front.chat())[0] == 200


async def test_missing_folder_fails_only_its_model(serve: Serve) -> None:
    front = await serve()
    front.config.add("gone", folder=front.config.root / "models" / "x")
    assert await front.reload() == 500
    assert "the folder does not exist" in (await front.state("gone"))[1]
    assert (await front.chat())[0] == 200


async def test_slow_load_delays_no_other_model_and_can_be_cancelled(serve: Serve) -> None:
    front = await serve()
    front.config.add("slow", load="hang")
    slow = asyncio.create_task(front.reload())
    async with asyncio.timeout(LIMIT):
        while "slow" not in (await front.get("/v1/config"))[1]:
            pass
    front.config.add("quick")
    assert await front.reload() == 201
    waiting = asyncio.create_task(front.chat(model="slow"))
    assert (await front.chat(model="quick"))[0] == 200
    assert not slow.done()
    del front.config.models["slow"]
    assert await front.reload() == 201
    assert await asyncio.wait_for(slow, LIMIT) == 500  # for it was not loaded
    assert (await asyncio.wait_for(waiting, LIMIT))[0] in (404, 503)
    assert "slow" not in (await front.get("/v1/config"))[1]


async def test_load_fails_after_the_load_timeout(serve: Serve) -> None:
    front = await serve(load_timeout=0.2, empty=True)
    front.config.add("slow", load="hang")
    assert await front.reload() == 500
    assert "not loaded in 0.2 s" in (await front.state("slow"))[1]


async def test_concurrent_reloads_have_one_result(serve: Serve) -> None:
    front = await serve()
    for number in range(3):
        front.config.add(f"n{number}")
    front.config.write()
    answers: list[Any] = await asyncio.gather(*(front.post("/v1/config/reload") for _ in range(4)))
    assert sorted(status for status, _ in answers) == [200, 200, 200, 201]
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(model.settled() for model in front.registry.models.values()))
    _, states = await front.get("/v1/config")
    assert [state["model_version_status"][0]["state"] for state in states.values()] == ["AVAILABLE"] * 4


async def test_model_beyond_the_memory_limit_is_rejected_with_figures(serve: Serve) -> None:
    front = await serve(memory_limit=200 << 20)
    assert (await front.chat())[0] == 200
    front.config.add("big")
    with (front.config.root / "models" / "big" / "weights.bin").open("wb") as weights:
        weights.truncate(300 << 20)
    assert await front.reload() == 500
    reason = (await front.state("big"))[1]
    assert reason.startswith("memory: 300 MiB")
    assert "200 MiB" in reason
    assert (await front.chat())[0] == 200


def alive(number: int) -> bool:
    import psutil

    return psutil.pid_exists(number)
