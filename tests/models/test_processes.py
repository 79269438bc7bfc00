"""What needs more than one process: a crash in the middle, two at once, a disk that refuses to take more."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.download.events import StepStarted, Success
from engine_plugin.models.store import ModelStore, PullRequest
from tests.models.fakes import SAMPLES, digest_of, files_below, pull
from tests.models.server import FileServer, Script
from tests.models.test_resume import until_progress
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REPOSITORY = Path(__file__).parents[2]


@asynccontextmanager
async def child(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.models.child", *map(str, arguments)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(process: asyncio.subprocess.Process, status: str) -> dict[str, Any]:
    """The first event with a status that begins so."""
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT):
        async for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["status"].startswith(status):
                return event
    raise AssertionError(f"the child ended without {status!r}")


@pytest.mark.promise("F25")
async def test_pull_of_a_killed_process_is_resumed_by_another(
    store: ModelStore, server: FileServer, root: Path, data: bytes
) -> None:
    server.scripts.append(Script(stall_after=300_000))
    async with child(root, server.url(), "model") as process:
        await said(process, "downloading")
        assert (await said(process, "downloading"))["completed"] > 0
        process.kill()
    size = (root / ".partial/model.part").stat().st_size
    assert 0 < size <= 300_000
    assert [model.name for model in await store.list() if not model.bundled] == []
    events = await pull(store, PullRequest("model", source=server.url()))
    assert events[-1] == Success("model", len(data), f"sha256:{digest_of(data)}")
    assert [request.range for request in server.requests] == ["", f"bytes={size}-"]


@pytest.mark.promise("P17")
async def test_a_second_process_waits_and_finds_the_model_there(
    store: ModelStore, server: FileServer, root: Path, data: bytes
) -> None:
    script = Script(stall_after=300_000)
    server.scripts.append(script)
    request = PullRequest("model", source=server.url(), sha256=digest_of(data))
    async with asyncio.timeout(LIMIT), child(root, f"{server.url()}#sha256={digest_of(data)}", "model") as process:
        await said(process, "downloading")
        async with aclosing(store.pull(request)) as events:
            async for event in events:
                if event == StepStarted("waiting for another process that pulls model"):
                    script.go.set()
            assert event == Success("model", len(data), f"sha256:{digest_of(data)}")
        assert (await said(process, "success"))["completed"] == len(data)
    assert len(server.requests) == 1


async def test_second_process_waits_for_this_one(store: ModelStore, server: FileServer, root: Path) -> None:
    server.scripts.append(Script(stall_after=300_000))
    async with aclosing(store.pull(PullRequest(server.url()))) as events:
        await until_progress(events)
        async with child(root, server.url(), "model") as process:
            await said(process, "waiting for another process")
            await events.aclose()
            await said(process, "success")


@pytest.mark.promise("P19")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
@pytest.mark.parametrize("local", [True, False])
async def test_error_for_a_full_disk_has_numbers(
    store: ModelStore, server: FileServer, root: Path, data: bytes, local: bool
) -> None:
    source = str(SAMPLES / "tiny-chat.gguf") if local else server.url()
    async with child(root, source, "model", 300_000) as process:
        event = await said(process, "failed")
    assert event["code"] == 500
    assert "300000" in event["message"]
    assert "move the data directory" in event["message"]
    assert files_below(root) == (set() if local else {".partial/model.part", ".partial/model.json"})
    assert ("Deleting the model removes it" in event["message"]) is not local
    assert "model" not in [model.name for model in await store.list()]
    assert (await pull(store, PullRequest("model", source=source)))[-1] == Success(
        "model", len(data), f"sha256:{digest_of(data)}"
    )
    if not local:
        assert server.requests[-1].range == "bytes=300000-"
