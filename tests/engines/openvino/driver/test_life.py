"""Deaths of the server and of workers, and stops during a start: errors, restarts, and no leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.engines.openvino import server as server_module
from engine_plugin.engines.openvino.graphs import lock_of
from engine_plugin.errors import BadGatewayError, EnginePluginError, PreconditionError, UnavailableError
from engine_plugin.system.files import in_thread
from tests.engines.llamacpp.running import eventually
from tests.engines.openvino.spoiling import spoil
from tests.patience import LIMIT

from .running import COUNT, ONE_STEP
from .test_memory import SAMPLES, drawing, served, writing

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Serve

pytestmark = pytest.mark.slow


async def test_death_of_the_server_ends_its_streams_and_its_models_are_reloaded(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-embed")
    async with writing(running) as texts:
        before = running.processes()
        running.server_process.kill()
        with pytest.raises(BadGatewayError, match="the OpenVINO server died: SIGKILL"):
            await texts
    assert (await running.client.invoke("chat", COUNT))["choices"], "shares the restart"
    await eventually(lambda: len(running.workers()) == 2)
    assert served(running) == ["tiny-chat", "tiny-embed"]
    assert not set(before) & set(running.processes()), "no process of the first run is left"
    assert await running.client.invoke("embed", {"input": "a"})
    assert await running.loaded() == ["tiny-chat", "tiny-embed"]
    assert (await running.client.health_check()) == "ready: 2 models loaded"


async def test_death_of_a_worker_affects_only_its_model(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-embed")
    [embed] = running.workers()
    async with writing(running) as texts:
        worker = running.workers()[-1]
        worker.kill()
        with pytest.raises(BadGatewayError, match="the engine answered 500"):
            await texts
    assert (await running.client.invoke("embed", {"input": "a"}))["data"]
    assert await running.client.invoke("chat", COUNT), "the worker was restarted"
    assert running.workers()[0] == embed
    assert running.workers()[-1] != worker


async def test_model_is_not_reloaded_after_the_server_died_during_its_load(serve: Serve) -> None:
    """The model may be the cause of the death, so the next run begins without it."""
    running = await serve()
    await running.client.load_model("tiny-chat")
    loading = asyncio.create_task(running.client.load_model("tiny-image"))
    await eventually(lambda: len(running.workers()) == 2)
    running.server_process.kill()
    with pytest.raises(EnginePluginError, match="died"):
        await loading
    assert (await running.client.invoke("chat", COUNT))["choices"]
    assert served(running) == ["tiny-chat"]
    assert await running.client.invoke("text-to-image", ONE_STEP)


async def test_server_at_its_restart_limit_starts_with_the_next_call(serve: Serve) -> None:
    running = await serve(restart_limit=0)
    await running.client.load_model("tiny-chat")
    running.server_process.kill()
    await eventually(lambda: running.server.dead)
    with pytest.raises(UnavailableError, match="SIGKILL"):
        await running.client.health_check()
    assert await running.loaded() == []
    assert (await running.client.invoke("chat", COUNT))["choices"], "a call starts the server"
    assert await running.client.health_check() == "ready: 1 models loaded"


@pytest.mark.promise("H7", "L2")
async def test_start_restarts_what_has_failed(serve: Serve) -> None:
    """A worker at its restart limit, then a failed server, then a removed socket."""
    running = await serve(restart_limit=0)
    await running.client.load_model("tiny-chat")
    running.workers()[0].kill()

    async def dead() -> str:
        try:
            return await running.client.health_check()
        except UnavailableError as error:
            return str(error)

    async with asyncio.timeout(LIMIT):
        while "tiny-chat is not served" not in await dead():  # noqa: ASYNC110  # no event says so
            await asyncio.sleep(0.02)
    with pytest.raises(UnavailableError, match="tiny-chat is not served"):
        await running.client.health_check()
    await running.client.start_engine()
    assert await running.client.health_check() == "ready: 1 models loaded"
    running.server_process.kill()
    await eventually(lambda: running.server.failed)
    await running.client.start_engine()
    assert await running.client.health_check() == "ready: 1 models loaded"
    assert running.engine.sockets is not None
    shutil.rmtree(running.engine.sockets)
    assert "was removed" in await dead()
    await running.client.start_engine()
    assert (await running.client.invoke("chat", COUNT))["choices"]
    assert await running.client.health_check() == "ready: 1 models loaded"


async def test_start_after_a_stop_loads_no_models(serve: Serve) -> None:
    running = await serve()
    async with writing(running) as texts:
        await running.client.stop_engine()
        with pytest.raises(UnavailableError, match="the engine was stopped while it worked"):
            await texts
    assert running.processes() == []
    assert not list((running.engine.manifest.data_dir / "served").iterdir())
    with pytest.raises(UnavailableError, match="Call StartEngine"):
        await running.client.invoke("chat", COUNT)
    with pytest.raises(UnavailableError):
        await running.client.health_check()
    await running.client.start_engine()
    assert running.workers() == [], "a fresh start loads nothing"
    assert (await running.client.invoke("chat", COUNT))["choices"]


async def test_stop_during_a_start_ends_it(serve: Serve) -> None:
    running = await serve(start=False)
    starting = [asyncio.create_task(running.client.start_engine()) for _ in range(3)]
    await eventually(lambda: bool(running.processes()))
    await running.client.stop_engine()
    outcomes = await asyncio.gather(*starting, return_exceptions=True)
    assert all(isinstance(outcome, UnavailableError) for outcome in outcomes), outcomes
    assert running.processes() == []
    await running.client.start_engine()
    assert await running.client.health_check() == "ready: 0 models loaded"


async def test_stop_during_a_load_ends_it(serve: Serve) -> None:
    running = await serve()
    loading = asyncio.create_task(running.client.load_model("tiny-image"))
    await eventually(lambda: bool(running.workers()))
    await running.client.stop_engine()
    with pytest.raises(UnavailableError):
        await loading
    assert running.processes() == []


async def test_change_of_mode_reloads_the_models(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-chat")
    [worker], server = running.workers(), running.server_process
    with pytest.raises(PreconditionError, match=r"sees no NPU \(devices: CPU \("):
        await running.client.start_engine("npu")
    assert running.workers() == [worker], "the running model is not affected"
    await running.client.start_engine("daemon")
    assert running.workers() == [worker]
    await running.client.start_engine("cpu")
    assert await running.loaded() == served(running) == ["tiny-chat"]
    assert worker not in running.workers()
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    assert (await running.client.get_config())["device_type"] == "cpu"


@pytest.mark.promise("U10")
async def test_queued_requests_continue_on_the_next_server(serve: Serve) -> None:
    running = await serve(parallel=1, drain_timeout=0.2)
    async with drawing(running) as picture:
        waiting = asyncio.create_task(running.client.invoke("text-to-image", ONE_STEP))
        await eventually(lambda: running.engine.pool.users("tiny-image") == 2)
        await running.client.start_engine("cpu")
        with pytest.raises(UnavailableError):
            await picture
        async with asyncio.timeout(LIMIT):
            assert (await waiting)["data"]


async def test_mode_gpu_without_a_gpu_is_rejected(serve: Serve) -> None:
    running = await serve(start=False)
    with pytest.raises(PreconditionError, match="Start in mode auto or cpu"):
        await running.client.start_engine("gpu")
    assert running.processes() == []


async def test_missing_device_of_plugin_yaml_is_reported(serve: Serve) -> None:
    running = await serve(start=False, embed={"device": "GPU"})
    with pytest.raises(PreconditionError, match=r"engine\.embed\.device: GPU was asked for.*Correct plugin\.yaml"):
        await running.client.start_engine()
    assert running.processes() == []
    await running.client.start_engine("cpu")
    assert (await running.client.invoke("embed", {"input": "a"}))["data"]


async def test_failed_start_leaves_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    running = await serve(start=False)
    with monkeypatch.context() as broken:
        broken.setattr(server_module, "SERVER_MODULE", "absent_server")
        with pytest.raises(EnginePluginError, match="No module named absent_server"):
            await running.client.start_engine()
    assert running.processes() == []
    assert list((running.engine.manifest.data_dir / "served").iterdir()) == []
    await running.client.start_engine()
    assert (await running.client.invoke("chat", COUNT))["choices"]


async def test_server_on_a_port_answers(serve: Serve) -> None:
    running = await serve(transport="tcp")
    assert (await running.client.invoke("chat", COUNT))["choices"]
    running.server_process.kill()
    await eventually(lambda: running.server.crashed)
    assert (await running.client.invoke("chat", COUNT))["choices"]


def holding(folder: Path, text: bytes) -> list[Path]:
    """The files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


async def test_key_is_in_no_argv_environment_or_file(serve: Serve) -> None:
    running = await serve()
    await running.client.load_model("tiny-chat")
    key = running.server.key
    assert key
    for process in running.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            assert key not in " ".join(process.cmdline())
            assert key not in "".join(process.environ().values())
    assert not await in_thread(holding, running.engine.manifest.data_dir, key.encode())


async def test_leftovers_of_a_killed_plugin_are_removed(serve: Serve) -> None:
    """They are detected by the lock, because a pid may be reused or belong to another container."""
    running = await serve(start=False)
    folder = running.engine.manifest.data_dir / "served"
    stale, living = folder / "0123456789abcdef", folder / "fedcba9876543210"
    for place in (stale, living):
        (place / "tiny-chat-1").mkdir(parents=True)
        (place / "tiny-chat-1" / "graph.pbtxt").write_text("of an older version")
        (place / "config.json").write_text('{"mediapipe_config_list": []}')
    lock_of(stale).acquire(timeout=0).lock.release()
    with lock_of(living).acquire(timeout=0):
        await running.client.start_engine()
        mine = running.server.served.folder
        assert set(folder.iterdir()) == {living, living.with_suffix(".lock"), mine, mine.with_suffix(".lock")}
    await running.client.stop_engine()
    assert set(folder.iterdir()) <= {living, living.with_suffix(".lock")}


@pytest.mark.promise("S12")
async def test_unusable_model_is_not_retried(serve: Serve) -> None:
    running = await serve()
    await running.client.pull_model("broken", source=str(SAMPLES / "tiny-embed"))
    spoil(running.engine.manifest.data_dir / "models" / "broken" / "openvino_model.xml")
    for _ in range(2):
        with pytest.raises(PreconditionError, match=r"broken cannot be loaded: .*pull it again"):
            await running.client.invoke("embed", {"model": "broken", "input": "a"})
    assert (await running.client.invoke("embed", {"input": "a"}))["data"]
