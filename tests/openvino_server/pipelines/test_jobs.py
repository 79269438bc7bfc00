"""The queue in front of a model that computes one call at a time, and the end of a worker whose model fails."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvino_server.frames import Channel, Inbox, receive
from openvino_server.pipelines import CANCELLED, Job, OneAtATime
from tests.patience import LIMIT

from .running import SAMPLES, worker

FAILING = (str(Path(__file__).with_name("failing.py")),)


class Held(OneAtATime):
    """A model whose calls last until `released` is set."""

    facts: dict[str, Any]

    def __init__(self) -> None:
        self.facts = {}
        self.released = threading.Event()

    def run(self, job: Job) -> dict[str, Any]:
        self.released.wait(LIMIT)
        return {"number": job.number}


async def test_job_cancelled_in_the_queue_frees_its_request_at_once() -> None:
    inbox: Inbox = queue.SimpleQueue()
    reader, writer = os.pipe()
    model = Held()
    serving = asyncio.create_task(asyncio.to_thread(model.serve, inbox, Channel(writer)))
    try:
        audio = np.zeros(16000)
        kept = weakref.ref(audio)
        inbox.put(("do", 1, {}))
        inbox.put(("do", 2, {"audio": audio}))
        del audio
        inbox.put(("cancel", 2))
        assert await asyncio.wait_for(asyncio.to_thread(receive, reader), LIMIT) == ("error", 2, *CANCELLED)
        assert kept() is None
    finally:
        inbox.put(("quit",))
        model.released.set()
        await asyncio.wait_for(serving, LIMIT)
        os.close(writer)
        os.close(reader)


async def test_answer_that_cannot_be_sent_ends_the_worker(capfd: pytest.CaptureFixture[str]) -> None:
    async with worker("answer", SAMPLES, program=FAILING) as running:
        call = running.begin("embed", input="a")
        with pytest.raises(EOFError):
            await call.done()
        assert await asyncio.wait_for(running.process.wait(), LIMIT) == 1
    error = capfd.readouterr().err
    assert "Traceback" in error
    assert "cannot pickle" in error


async def test_failed_step_ends_the_worker_although_a_thread_is_busy() -> None:
    async with worker("step", SAMPLES, program=FAILING) as running:
        running.begin("embed", input="a")
        assert await asyncio.wait_for(running.process.wait(), LIMIT) == 1
