from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.download.events import ChunkProgress, PullEvent
from engine_plugin.download.fetch import ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.system.files import (
    in_thread,
    opened,
    private_data_dir,
    private_folder,
    read_json,
    sha256_of,
    write_json,
)
from tests.models.fakes import digest_of
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path


@pytest.mark.promise("F24")
async def test_cancelled_caller_waits_for_its_thread_to_finish() -> None:
    begun, go, over = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(LIMIT)
        over.set()

    task = asyncio.create_task(in_thread(work))
    assert await asyncio.to_thread(begun.wait, LIMIT)
    for _ in range(3):  # a second cancellation does not let it go earlier
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=0.01)
        assert not done
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, LIMIT)
    assert over.is_set()


@pytest.mark.promise("U2")
@pytest.mark.parametrize("finds_it", [False, True], ids=["alone", "a living thread finds the work too"])
async def test_work_runs_once_where_no_thread_can_be_created(finds_it: bool) -> None:
    done: list[int] = []
    queued: list[Callable[[], object]] = []

    class Full(ThreadPoolExecutor):
        """As Python's own, which keeps the work in its queue when it fails to create a thread."""

        def submit(self, work: Callable[..., Any], /, *args: Any, **_options: Any) -> Any:
            queued.append(lambda: work(*args))
            if finds_it:
                queued[0]()
            raise RuntimeError("can't start new thread")

    with Full() as full:
        asyncio.get_running_loop().set_default_executor(full)
        await in_thread(done.append, 1)
        queued[0]()
        assert done == [1]
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 1, 0)


async def test_exception_in_a_thread_is_raised_to_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


def test_json_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1}, tmp_path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()}, tmp_path)
    assert read_json(path) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["x.json"]
    path.write_bytes(b"\xff")
    assert read_json(path) is None


async def test_digest_covers_the_whole_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000  # more than one block
    path = tmp_path / "big"
    path.write_bytes(data)
    assert await sha256_of(path) == f"sha256:{digest_of(data)}"


def test_progress_is_throttled_but_the_last_is_reported() -> None:
    events: list[PullEvent] = []
    report = ProgressReport(events.append, "ab", every_s=3600)
    for completed in range(1000):
        report.at(completed, 1000)
    report.at(1000, 1000, last=True)
    assert events == [ChunkProgress("sha256:ab", 0, 1000), ChunkProgress("sha256:ab", 1000, 1000)]


class SlowOpen:
    """Opens one file late, as on a slow disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: Path) -> None:
        self.descriptor = -1
        self._begun, self._go = threading.Event(), threading.Event()
        really_open = os.open

        def open_late(path: Any, *arguments: Any, **more: Any) -> int:
            if path != slow:
                return really_open(path, *arguments, **more)
            self._begun.set()
            assert self._go.wait(LIMIT)
            self.descriptor = really_open(path, *arguments, **more)
            return self.descriptor

        monkeypatch.setattr(os, "open", open_late)

    async def cancel_meanwhile(self, use: Coroutine[Any, Any, None]) -> None:
        """Run `use`, and cancel it while the file is being opened."""
        using = asyncio.create_task(use)
        assert await asyncio.to_thread(self._begun.wait, LIMIT)
        using.cancel()
        await asyncio.sleep(0)
        self._go.set()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert self.descriptor >= 0


@pytest.mark.promise("F24")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in its file system")
async def test_file_opened_after_the_cancellation_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open takes a while, as on a slow disk, and the caller is cancelled meanwhile."""
    slow = tmp_path / "slow"
    slow.touch()
    late = SlowOpen(monkeypatch, slow)

    async def use() -> None:
        async with opened(slow):
            raise AssertionError("cancelled before it was open")

    await late.cancel_meanwhile(use())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(late.descriptor)


@pytest.mark.promise("F24")
async def test_partial_opened_after_the_cancellation_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = Partial(tmp_path, "m")
    late = SlowOpen(monkeypatch, partial.path)

    async def use() -> None:
        async with partial.opened():
            raise AssertionError("cancelled before it was open")

    await late.cancel_meanwhile(use())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(late.descriptor)
    with pytest.raises(ValueError, match="not open"):
        partial.write(b"x")


@pytest.mark.promise("X3")
@pytest.mark.skipif(os.name == "nt", reason="the permissions of Windows are ACLs")
def test_new_directories_are_private_and_non_empty_ones_are_kept(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return path.stat().st_mode & 0o777

    before = os.umask(0)
    try:
        private_folder(tmp_path / "new" / "data" / "run")
        assert [mode(tmp_path / place) for place in ("new", "new/data", "new/data/run")] == [0o700] * 3
        old = tmp_path / "old"
        (old / "run").mkdir(parents=True)
        private_data_dir(old)
        private_folder(old / "run")
        assert (mode(old), mode(old / "run")) == (0o700, 0o700)
        shared = tmp_path / "shared"
        (shared / "of another program").mkdir(parents=True)
        private_data_dir(shared)
        assert mode(shared) == 0o777
    finally:
        os.umask(before)
