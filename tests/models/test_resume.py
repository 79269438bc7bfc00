"""Downloads that break off: what is asked for next, and when it is given up."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import ModelNotFoundError, PullError
from engine_plugin.models.store import FetchPolicy, ModelStore, PullRequest
from tests.models.fakes import Inspector, digest_of, files_below, pull
from tests.models.server import FileServer, Script
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from engine_plugin.download.events import PullEvent

PART = ".partial/model.part"


@pytest.fixture
def success(data: bytes) -> Success:
    return Success("model", len(data), f"sha256:{digest_of(data)}")


async def until_progress(events: AsyncGenerator[PullEvent, None]) -> ChunkProgress:
    async for event in events:
        if isinstance(event, ChunkProgress) and event.completed:
            return event
    raise AssertionError("the pull ended without progress")


async def leave_part(store: ModelStore, server: FileServer, size: int = 200_000, sha256: str = "") -> int:
    """Cancel a pull after its first progress; return how many bytes are on the disk."""
    server.scripts.append(Script(stall_after=size))
    async with aclosing(store.pull(PullRequest(server.url(), sha256=sha256))) as events:
        await until_progress(events)
    return (store.root / PART).stat().st_size


@pytest.mark.promise("F25")
async def test_dropped_connection_resumes(
    store: ModelStore, server: FileServer, data: bytes, success: Success
) -> None:
    server.scripts.extend([Script(drop_after=200_000), Script(drop_after=150_000), Script()])
    events = await pull(store, PullRequest(server.url()))
    assert events[-1] == success
    starts = [int(request.range[6:-1]) for request in server.requests[1:]]
    assert 0 < starts[0] < starts[1] <= 350_000
    assert [request.headers.get("if-range") for request in server.requests] == [None, server.etag, server.etag]
    assert any(isinstance(event, StepStarted) and "trying again" in event.text for event in events)


@pytest.mark.parametrize(
    "script",
    [
        Script(status=500),
        Script(status=503, headers={"Retry-After": "0"}),
        Script(status=429, headers={"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}),
        Script(drop_after=0),
        Script(drop_after=1000, chunked=True),
    ],
)
async def test_download_survives_a_burst_of_failures(
    store: ModelStore, server: FileServer, success: Success, script: Script
) -> None:
    server.scripts.extend([replace(script), replace(script)])
    assert (await pull(store, PullRequest(server.url())))[-1] == success
    assert len(server.requests) == 3


async def test_failures_without_progress_end_the_download(store: ModelStore, server: FileServer, root: Path) -> None:
    server.scripts.extend(Script(status=503) for _ in range(9))
    with pytest.raises(PullError, match="HTTP 503; 3 attempts made no progress after 0 bytes"):
        await pull(store, PullRequest(server.url()))
    assert len(server.requests) == 3
    assert files_below(root) == set()


async def test_slow_drip_is_not_progress(store: ModelStore, server: FileServer) -> None:
    server.scripts.extend(Script(drop_after=10) for _ in range(9))
    with pytest.raises(PullError, match="no progress after 30 bytes"):
        await pull(store, PullRequest(server.url()))
    assert len(server.requests) == 3


async def test_body_shorter_than_announced_fails(store: ModelStore, server: FileServer, data: bytes) -> None:
    server.etag = ""
    server.scripts.extend(Script(length=len(data) + 100) for _ in range(9))
    with pytest.raises(PullError, match="attempts made no progress"):
        await pull(store, PullRequest(server.url()))
    assert len(server.requests) == 4  # the first brought something


async def test_body_longer_than_announced_fails(store: ModelStore, server: FileServer, data: bytes) -> None:
    size = await leave_part(store, server)
    server.scripts.append(
        Script(
            status=206,
            chunked=True,
            body=data,
            headers={"Content-Range": f"bytes {size}-{len(data) - 1}/{len(data)}"},
        )
    )
    with pytest.raises(PullError, match=f"more than the {len(data)} bytes"):
        await pull(store, PullRequest(server.url()))


@pytest.mark.parametrize(
    ("content_range", "text"),
    [
        ("bytes 0-{last}/{total}", "sent bytes from 0"),
        ("bytes {start}-{last}/{more}", "size of the file changed"),
    ],
)
async def test_wrong_content_range_fails(
    store: ModelStore, server: FileServer, data: bytes, content_range: str, text: str
) -> None:
    start, total = await leave_part(store, server), len(data)
    header = content_range.format(start=start, last=total - 1, total=total, more=total + 1)
    body = data[0 if "0-" in content_range[:8] else start :]
    server.scripts.append(Script(status=206, body=body, headers={"Content-Range": header, "ETag": server.etag}))
    with pytest.raises(PullError, match=text):
        await pull(store, PullRequest(server.url()))


async def test_stalled_connection_is_closed_and_resumed(
    root: Path, inspector: Inspector, policy: FetchPolicy, server: FileServer, success: Success
) -> None:
    store = ModelStore(root, inspect=inspector, policy=replace(policy, stall_s=0.3))
    server.scripts.append(Script(stall_after=100_000))
    events = await pull(store, PullRequest(server.url()))
    assert events[-1] == success
    assert server.requests[1].range == "bytes=100000-"


@pytest.mark.promise("F25")
async def test_cancelled_pull_requests_only_the_rest(
    store: ModelStore, server: FileServer, root: Path, data: bytes, success: Success
) -> None:
    size = await leave_part(store, server)
    assert 0 < size <= 200_000
    assert (root / PART).read_bytes() == data[:size]
    assert "model" not in [model.name for model in await store.list()]
    sent = server.sent
    assert (await pull(store, PullRequest(server.url())))[-1] == success
    assert server.requests[-1].range == f"bytes={size}-"
    assert server.sent - sent == len(data) - size
    assert files_below(root) == {"model.gguf", "model.json"}


async def test_last_modified_is_used_without_an_etag(store: ModelStore, server: FileServer, success: Success) -> None:
    server.etag, server.last_modified = "", "Mon, 01 Jan 2024 00:00:00 GMT"
    await leave_part(store, server)
    assert (await pull(store, PullRequest(server.url())))[-1] == success
    assert server.requests[-1].headers["if-range"] == server.last_modified


@pytest.mark.promise("F25")
async def test_weak_etag_does_not_resume(store: ModelStore, server: FileServer, success: Success) -> None:
    server.etag = 'W/"1"'
    await leave_part(store, server)
    assert (await pull(store, PullRequest(server.url())))[-1] == success
    assert server.requests[-1].range == ""


@pytest.mark.promise("F25")
@pytest.mark.parametrize("etag", ['"v\xe9rsion"', '"\x7f"'])
async def test_etag_that_is_not_a_valid_header_is_ignored(
    store: ModelStore, server: FileServer, etag: str, success: Success
) -> None:
    """Else no attempt after the first could ever be made."""
    server.etag = etag
    server.scripts.append(Script(drop_after=50_000))
    assert (await pull(store, PullRequest(server.url())))[-1] == success
    assert [request.headers.get("if-range") for request in server.requests] == [None, None]


async def test_with_a_known_digest_no_etag_is_needed(
    store: ModelStore, server: FileServer, data: bytes, success: Success
) -> None:
    server.etag = ""
    size = await leave_part(store, server, sha256=digest_of(data))
    assert (await pull(store, PullRequest(server.url(), sha256=digest_of(data))))[-1] == success
    assert server.requests[-1].range == f"bytes={size}-"
    assert "if-range" not in server.requests[-1].headers


async def test_another_source_or_digest_does_not_continue_a_partial(
    store: ModelStore, server: FileServer, data: bytes, success: Success
) -> None:
    await leave_part(store, server, sha256="0" * 64)
    assert (await pull(store, PullRequest(server.url(), sha256=digest_of(data))))[-1] == success
    assert server.requests[-1].range == ""
    await store.delete("model")
    await leave_part(store, server)
    await pull(store, PullRequest("model", source=server.url("/mirror")))
    assert server.requests[-1].range == ""


async def test_server_without_ranges_sends_the_whole_file_again(
    store: ModelStore, server: FileServer, success: Success
) -> None:
    await leave_part(store, server)
    server.scripts.append(Script(ignore_range=True))
    assert (await pull(store, PullRequest(server.url())))[-1] == success


async def test_server_that_always_drops_and_has_no_ranges_fails(store: ModelStore, server: FileServer) -> None:
    server.scripts.extend(Script(ignore_range=True, drop_after=200_000) for _ in range(20))
    with pytest.raises(PullError, match="attempts made no progress"):
        await pull(store, PullRequest(server.url()))
    assert len(server.requests) == 4


@pytest.mark.promise("F25")
@pytest.mark.parametrize("honours_if_range", [True, False])
async def test_a_file_that_changed_on_the_server_starts_over(
    store: ModelStore, server: FileServer, data: bytes, honours_if_range: bool
) -> None:
    size = await leave_part(store, server)
    server.data, server.etag = b"GGUF" + data[::-1], '"version-2"'
    if not honours_if_range:
        rest = {"Content-Range": f"bytes {size}-{len(data) - 1}/{len(data)}", "ETag": server.etag}
        server.scripts.append(Script(status=206, body=server.data[size : len(data)], headers=rest))
    events = await pull(store, PullRequest(server.url()))
    assert events[-1] == Success("model", len(server.data), f"sha256:{digest_of(server.data)}")
    assert (await store.get("model")).path.read_bytes() == server.data


async def test_complete_partial_needs_no_more_bytes(
    store: ModelStore, server: FileServer, root: Path, data: bytes, success: Success
) -> None:
    await leave_part(store, server)
    (root / PART).write_bytes(data)  # as a crash between the last byte and the installation leaves it
    sent = server.sent
    assert (await pull(store, PullRequest(server.url())))[-1] == success
    assert server.requests[-1].range == f"bytes={len(data)}-"
    assert server.sent == sent


async def test_complete_partial_with_known_digest_needs_no_server(
    store: ModelStore, server: FileServer, root: Path, data: bytes, success: Success
) -> None:
    await leave_part(store, server, sha256=digest_of(data))
    (root / PART).write_bytes(data)
    asked = len(server.requests)
    assert (await pull(store, PullRequest(server.url(), sha256=digest_of(data))))[-1] == success
    assert len(server.requests) == asked


async def test_a_partial_longer_than_the_file_starts_over(
    store: ModelStore, server: FileServer, root: Path, data: bytes, success: Success
) -> None:
    await leave_part(store, server)
    (root / PART).write_bytes(data + b"too much")
    assert (await pull(store, PullRequest(server.url())))[-1] == success


@pytest.mark.promise("F25")
async def test_damaged_partial_fails_the_digest(
    store: ModelStore, server: FileServer, root: Path, data: bytes, success: Success
) -> None:
    size = await leave_part(store, server, sha256=digest_of(data))
    (root / PART).write_bytes(bytes(size))
    request = PullRequest(server.url(), sha256=digest_of(data))
    with pytest.raises(PullError, match=f"expected sha256:{digest_of(data)}"):
        await pull(store, request)
    assert (await pull(store, request))[-1] == success


@pytest.mark.promise("P27")
async def test_damaged_state_starts_over(store: ModelStore, server: FileServer, root: Path, success: Success) -> None:
    for text in ("{", '{"unknown": 1}', '{"source": 7}'):
        await leave_part(store, server)
        (root / ".partial/model.json").write_text(text)
        assert (await pull(store, PullRequest(server.url())))[-1] == success
        assert server.requests[-1].range == ""
        await store.delete("model")


async def test_cancel_while_earlier_bytes_are_read_keeps_them(tmp_path: Path) -> None:
    """A fetch deletes a partial that is empty when it ends."""
    (tmp_path / "m.part").write_bytes(bytes(3000))
    partial = Partial(tmp_path, "m")
    async with partial.opened():
        reading = asyncio.create_task(partial.resume())
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert partial.size == 3000


@pytest.fixture
def fetch(tmp_path: Path, policy: FetchPolicy) -> Fetch:
    """A download that finds the bytes and the state of an earlier attempt."""
    (tmp_path / "m.part").write_bytes(bytes(3000))
    (tmp_path / "m.json").write_text("{}")
    source = HttpSource.parse("http://127.0.0.1:9/m.gguf")
    return Fetch(source, Partial(tmp_path, "m"), ProgressReport(lambda _: None), policy)


@pytest.mark.promise("F25")
async def test_partial_that_cannot_be_opened_is_kept(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if path == fetch.partial.path:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return really_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        await fetch.run()
    assert files_below(fetch.partial.folder) == {"m.part", "m.json"}


@pytest.mark.promise("F25")
async def test_cancel_while_the_partial_is_opened_keeps_it(fetch: Fetch) -> None:
    fetching = asyncio.create_task(fetch.run())
    await asyncio.sleep(0)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert files_below(fetch.partial.folder) == {"m.part", "m.json"}
    assert fetch.partial.path.stat().st_size == 3000


async def test_delete_removes_what_an_interrupted_pull_left(
    store: ModelStore, server: FileServer, root: Path
) -> None:
    await leave_part(store, server)
    await store.delete("model")
    assert files_below(root) == set()
    with pytest.raises(ModelNotFoundError):
        await store.delete("model")


def test_patience_is_longer_than_any_policy_here(policy: FetchPolicy) -> None:
    assert policy.stall_s * policy.attempts < LIMIT
