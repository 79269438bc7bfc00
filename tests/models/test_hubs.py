"""Pulls from repositories on hubs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from engine_plugin.catalogue import CHECKSUM_MISMATCH
from engine_plugin.download.events import ChunkProgress, Success
from engine_plugin.errors import (
    ModelNotFoundError,
    PreconditionError,
    PullError,
)
from engine_plugin.models.store import PullRequest
from tests.models.fakes import pull
from tests.models.folderworld import DONE, NEEDED, SIZE, SOURCES, FolderWorld, tree_digest
from tests.models.hub import COMMIT, MODEL, REPOSITORY
from tests.models.server import Script
from tests.models.test_resume import until_progress
from tests.patience import LIMIT

if TYPE_CHECKING:
    from pathlib import Path


def without_digests(tree: dict[str, bytes]) -> list[dict[str, Any]]:
    """The entries of both hubs for these files, without their digests."""
    return [
        {"rfilename": path, "size": len(data), "Path": path, "Type": "blob", "Size": len(data)}
        for path, data in tree.items()
    ]


@pytest.mark.parametrize("source", SOURCES)
async def test_a_repository_becomes_a_model(world: FolderWorld, source: str) -> None:
    events = await pull(world.store, PullRequest(source))
    assert events[-1] == DONE
    progress = [event for event in events if isinstance(event, ChunkProgress)]
    assert {event.total for event in progress} == {SIZE}
    assert (progress[0].completed, progress[-1].completed) == (0, SIZE)
    assert [event.completed for event in progress] == sorted(event.completed for event in progress)
    model = await world.store.get(REPOSITORY)
    assert (model.path, model.kind, model.size, model.digest) == (world.place, "chat", SIZE, DONE.digest)
    assert world.content() == NEEDED
    assert world.inspected[0].name == world.place.name
    record = json.loads((world.root / ".records" / f"{REPOSITORY}.json").read_text())
    assert record["source"].startswith(f"{source}@")
    assert world.leftovers() == set()
    assert [found.name for found in await world.another().list()] == [REPOSITORY]


async def test_commit_is_recorded_and_files_are_requested_by_it(world: FolderWorld) -> None:
    await pull(world.store, PullRequest(f"hf:{REPOSITORY}@v1"))
    record = json.loads((world.root / ".records" / f"{REPOSITORY}.json").read_text())
    assert record["validator"] == COMMIT
    paths = [request.path for request in world.hub.requests if "/resolve/" in request.path]
    assert paths
    assert all(path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/") for path in paths)


@pytest.mark.parametrize("source", SOURCES)
async def test_second_pull_fetches_only_changed_files(world: FolderWorld, source: str) -> None:
    await pull(world.store, PullRequest(source))
    world.hub.fetched.clear()
    assert (await pull(world.store, PullRequest(source)))[-1] == DONE
    assert (await pull(world.store, PullRequest(REPOSITORY)))[-1] == DONE
    assert world.hub.fetched == []
    world.hub.tree["config.json"] = b'{"model_type": "newer"}'
    world.hub.commit = "1" * 40
    newer = NEEDED | {"config.json": world.hub.tree["config.json"]}
    assert (await pull(world.store, PullRequest(source)))[-1] == Success(REPOSITORY, SIZE + 2, tree_digest(newer))
    assert world.hub.fetched == [("config.json", "")]
    assert world.content() == newer


@pytest.mark.promise("F25")
@pytest.mark.parametrize("source", SOURCES)
async def test_dropped_connection_resumes(world: FolderWorld, source: str) -> None:
    world.hub.troubles["weights.bin"].extend([Script(drop_after=200_000), Script(drop_after=0), Script()])
    assert (await pull(world.store, PullRequest(source)))[-1] == DONE
    ranges = [found for name, found in world.hub.fetched if name == "weights.bin"]
    assert ranges[0] == ""
    assert len(ranges) == 3
    assert 0 < int(ranges[1][6:-1]) <= 200_000


@pytest.mark.promise("F25")
@pytest.mark.parametrize("source", SOURCES)
async def test_a_cancelled_pull_is_resumed_after_a_restart(world: FolderWorld, source: str) -> None:
    world.hub.troubles["weights.bin"].append(Script(stall_after=200_000))
    async with asyncio.timeout(LIMIT), aclosing(world.store.pull(PullRequest(source))) as events:
        async for event in events:
            if isinstance(event, ChunkProgress) and event.completed > SIZE - len(MODEL["weights.bin"]):
                break
    await world.store.aclose()
    assert not world.place.exists()
    assert await world.store.list() == []
    world.hub.fetched.clear()
    again = await pull(world.another(), PullRequest(source))
    assert again[-1] == DONE
    assert [name for name, _ in world.hub.fetched] == ["weights.bin"]
    assert int(world.hub.fetched[0][1][6:-1]) > 0
    first = next(event for event in again if isinstance(event, ChunkProgress))
    assert (first.completed, first.total) == (SIZE - len(MODEL["weights.bin"]), SIZE)
    assert world.leftovers() == set()


async def test_files_of_an_interrupted_pull_are_verified(world: FolderWorld) -> None:
    world.hub.troubles["weights.bin"].append(Script(status=404))
    with pytest.raises(ModelNotFoundError):
        await pull(world.store, PullRequest(SOURCES[0]))
    left = next((world.root / ".partial").glob("*/*/unet/weights.bin"))
    left.write_bytes(left.read_bytes()[:-1] + b"!")
    world.hub.fetched.clear()
    assert (await pull(world.store, PullRequest(SOURCES[0])))[-1] == DONE
    assert {name for name, _ in world.hub.fetched} == {"unet/weights.bin", "weights.bin"}


@pytest.mark.promise("P18")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["weights.bin", "config.json"])
async def test_file_that_differs_from_the_list_is_rejected(world: FolderWorld, source: str, name: str) -> None:
    lie = bytes(len(MODEL[name]))
    world.hub.troubles[name].append(Script(body=lie))
    with pytest.raises(PullError, match=f"{name} differs from the file that the hub lists"):
        await pull(world.store, PullRequest(source))
    assert await world.store.list() == []
    assert (await pull(world.store, PullRequest(source)))[-1] == DONE


@pytest.mark.promise("P18")
@pytest.mark.parametrize(
    ("source", "digest"),
    [
        (SOURCES[0], "git:e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (SOURCES[1], "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ],
)
async def test_file_listed_as_empty_with_another_digest_is_rejected(
    world: FolderWorld, source: str, digest: str
) -> None:
    world.hub.listed = without_digests(NEEDED)
    empty = next(entry for entry in world.hub.listed if entry["Path"] == "empty.txt")
    empty.update(blobId="1" * 40, Sha256="1" * 64)
    with pytest.raises(PullError, match=r"empty\.txt differs from the file that the hub lists") as caught:
        await pull(world.store, PullRequest(source))
    assert caught.value.id == CHECKSUM_MISMATCH.id
    assert digest in caught.value.message
    assert await world.store.list() == []


@pytest.mark.promise("F25")
@pytest.mark.parametrize("source", SOURCES)
async def test_complete_files_without_digests_are_kept_by_their_sizes(world: FolderWorld, source: str) -> None:
    world.hub.listed = without_digests(MODEL)
    world.hub.troubles["weights.bin"].append(Script(status=404))
    with pytest.raises(ModelNotFoundError):
        await pull(world.store, PullRequest(source))
    left = next((world.root / ".partial").glob("*/*/unet/weights.bin"))
    left.write_bytes(left.read_bytes()[:-1])
    world.hub.fetched.clear()
    assert (await pull(world.store, PullRequest(source)))[-1] == DONE
    assert {name for name, _ in world.hub.fetched} == {"unet/weights.bin", "weights.bin"}


@pytest.mark.parametrize("source", SOURCES)
async def test_files_without_digests_are_not_taken_from_the_present_model(world: FolderWorld, source: str) -> None:
    await pull(world.store, PullRequest(source))
    world.hub.listed, world.hub.commit = without_digests(MODEL), "1" * 40
    world.hub.tree["weights.bin"] = bytes(len(MODEL["weights.bin"]))
    await pull(world.store, PullRequest(source))
    assert world.content() == NEEDED | {"weights.bin": world.hub.tree["weights.bin"]}


@pytest.mark.promise("F24")
async def test_cancel_ends_the_copies_from_the_present_model_after_one_file(
    world: FolderWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is copied where the file system has no hard links."""
    begun, go, copied = threading.Event(), threading.Event(), []

    def refuse(*_: object) -> NoReturn:
        raise OSError("no hard links here")

    def copy_late(source: Path, target: Path) -> None:
        copied.append(source)
        target.write_bytes(source.read_bytes())
        begun.set()
        assert go.wait(LIMIT)

    await pull(world.store, PullRequest(SOURCES[0]))
    world.hub.commit = "1" * 40
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", copy_late)
    pulling = asyncio.create_task(pull(world.store, PullRequest(SOURCES[0])))
    assert await asyncio.to_thread(begun.wait, LIMIT)
    pulling.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert len(copied) == 1


@pytest.mark.promise("P18")
@pytest.mark.parametrize("script", [Script(body=b"short"), Script(body=b"x" * 320_001)])
async def test_file_of_another_size_is_rejected(world: FolderWorld, script: Script) -> None:
    world.hub.troubles["weights.bin"].append(script)
    with pytest.raises(PullError, match="expected 320000"):
        await pull(world.store, PullRequest(SOURCES[0]))
    assert await world.store.list() == []


async def test_requested_digest_is_verified(world: FolderWorld) -> None:
    with pytest.raises(PullError, match="expected sha256:0000"):
        await pull(world.store, PullRequest(SOURCES[0], sha256="0" * 64))
    assert world.leftovers() == set()
    assert (await pull(world.store, PullRequest(SOURCES[0], sha256=DONE.digest)))[-1] == DONE


async def test_repository_without_a_model_is_not_installed(world: FolderWorld) -> None:
    world.hub.tree["config.json"] = b"no model"
    with pytest.raises(PullError, match=r"not a usable model: config\.json says so"):
        await pull(world.store, PullRequest(SOURCES[0]))
    assert world.leftovers() == set()
    assert not world.place.parent.exists()


@pytest.mark.promise("P17")
async def test_two_pulls_of_one_model_are_one(world: FolderWorld) -> None:
    script = Script(stall_after=100_000)
    world.hub.troubles["weights.bin"].append(script)
    request = PullRequest(SOURCES[0])
    async with (
        asyncio.timeout(LIMIT),
        aclosing(world.store.pull(request)) as first,
        aclosing(world.store.pull(request)) as second,
    ):
        await until_progress(first)
        await anext(second)
        with pytest.raises(PreconditionError, match="being pulled now"):
            await world.store.delete(REPOSITORY)
        with pytest.raises(PreconditionError, match="being pulled now"):
            await pull(world.store, PullRequest(SOURCES[1]))
        script.go.set()
        ends = [[event async for event in events][-1] for events in (first, second)]
    assert ends == [DONE, DONE]
    assert sum(name == "weights.bin" for name, _ in world.hub.fetched) == 1


async def test_delete_removes_what_a_cancelled_pull_left(world: FolderWorld) -> None:
    world.hub.troubles["weights.bin"].append(Script(stall_after=100_000))
    async with asyncio.timeout(LIMIT), aclosing(world.store.pull(PullRequest(SOURCES[0]))) as events:
        await until_progress(events)
    assert world.leftovers()
    await world.store.delete(REPOSITORY)
    assert world.leftovers() == set()
    with pytest.raises(ModelNotFoundError):
        await world.store.delete(REPOSITORY)


@pytest.mark.promise("P19")
async def test_full_disk_fails_before_the_download(world: FolderWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=SIZE))
    with pytest.raises(PullError, match=rf"\({SIZE} bytes\)"):
        await pull(world.store, PullRequest(SOURCES[0]))
    assert world.hub.fetched == []
    assert world.leftovers() == set()
