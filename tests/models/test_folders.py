"""A store of model folders: what lies in it, by whom it was put there, and copies of folders on this machine."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import ChunkProgress, Success
from engine_plugin.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    ModelUnusableError,
    PreconditionError,
    PullError,
)
from engine_plugin.models import layout
from engine_plugin.models import pull as pulling
from engine_plugin.models.info import bundled_samples
from engine_plugin.models.layout import FolderLayout, Staging, digest_of_folder
from engine_plugin.models.store import PullRequest
from tests.models.fakes import pull
from tests.models.folderworld import NEEDED, SIZE, FolderWorld, below, folder_world, lay_out, tree_digest
from tests.models.hub import MODEL, REPOSITORY
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from engine_plugin.download.events import PullEvent

DIGEST = tree_digest(NEEDED)


async def until(events: AsyncIterator[PullEvent], kind: type[PullEvent]) -> None:
    """Read the events up to the first one of a kind."""
    async for event in events:
        if isinstance(event, kind):
            return
    raise AssertionError(f"the pull ended without {kind}")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A folder on this machine that holds a model, and more."""
    folder = lay_out(tmp_path / "elsewhere" / "My-Model", MODEL)
    lay_out(folder, {".git/config": b"not ours", ".hidden": b"neither"})
    return folder


async def test_the_samples_are_listed_and_can_be_pulled(root: Path) -> None:
    samples = bundled_samples("openvino")
    async with folder_world(root, samples) as world:
        assert [model.name for model in await world.store.list()] == sorted(samples.names)
        assert list(root.parent.iterdir()) == []
        sample = samples.get("tiny-chat")
        assert sample is not None
        events = await pull(world.store, PullRequest("tiny-chat"))
        assert events[-1] == Success("tiny-chat", sample.size, sample.digest)
        model = await world.store.get("tiny-chat")
        assert (model.bundled, model.path) == (False, root / "tiny-chat")
        assert world.content(model.path) == world.content(sample.path)
        assert (await pull(world.store, PullRequest("own/copy", source="tiny-chat")))[-1] == Success(
            "own/copy", sample.size, sample.digest
        )
        await world.store.delete("tiny-chat")
        assert (await world.store.get("tiny-chat")).bundled
        with pytest.raises(PreconditionError, match="comes with the plugin's package"):
            await world.store.delete("tiny-chat")
        assert (await world.store.get("own/copy")).path == root / "own" / "copy"


@pytest.mark.parametrize("url", [False, True])
async def test_a_local_folder_is_copied_without_what_is_not_needed(
    world: FolderWorld, origin: Path, url: bool
) -> None:
    source = origin.as_uri() if url else str(origin)
    events = await pull(world.store, PullRequest(source))
    assert events[-1] == Success("My-Model", SIZE, DIGEST)
    progress = [event for event in events if isinstance(event, ChunkProgress)]
    assert (progress[0].completed, progress[0].total) == (0, SIZE)
    assert progress[-1].completed == SIZE
    model = await world.store.get("My-Model")
    assert world.content(model.path) == NEEDED
    assert await digest_of_folder(model.path) == DIGEST.removeprefix("sha256:")
    assert world.leftovers() == set()
    assert world.content(origin)["program.py"] == MODEL["program.py"]


async def test_unchanged_folder_is_not_copied_again(world: FolderWorld, origin: Path) -> None:
    request = PullRequest("me/mine", source=str(origin), model_type="embed")
    await pull(world.store, request)
    again = await pull(world.store, request)
    assert isinstance(again[-1], Success)
    assert not any(isinstance(event, ChunkProgress) for event in again)
    (origin / "config.json").write_bytes(b"{}")
    changed = NEEDED | {"config.json": b"{}"}
    assert (await pull(world.store, request))[-1] == Success(
        "me/mine", sum(map(len, changed.values())), tree_digest(changed)
    )
    model = await world.store.get("me/mine")
    assert (model.kind, world.content(model.path)) == ("embed", changed)


LINKS = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only privileged users link")


@LINKS
@pytest.mark.promise("X5")
async def test_links_that_stay_in_the_folder_are_followed(world: FolderWorld, origin: Path) -> None:
    (origin / "real").mkdir()
    (origin / "weights.bin").rename(origin / "real" / "blob")
    (origin / "weights.bin").symlink_to("real/blob")
    (origin / "itself").symlink_to(".")
    await pull(world.store, PullRequest(str(origin)))
    copied = (await world.store.get("My-Model")).path
    assert (copied / "weights.bin").read_bytes() == MODEL["weights.bin"]
    assert not (copied / "weights.bin").is_symlink()
    assert not (copied / "itself").exists()


@LINKS
@pytest.mark.promise("X5")
async def test_a_snapshot_in_the_cache_of_hugging_face_is_a_folder(world: FolderWorld, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    lay_out(cache / "blobs", {f"blob{number}": data for number, data in enumerate(MODEL.values())})
    snapshot = cache / "snapshots" / "0123"
    for number, path in enumerate(MODEL):
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to("../" * path.count("/") + f"../../blobs/blob{number}")
    assert (await pull(world.store, PullRequest("own", source=str(snapshot))))[-1] == Success("own", SIZE, DIGEST)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequestError, match=r"config\.json .* link that leaves the folder"):
        await pull(world.store, PullRequest("own", source=str(snapshot)))


@LINKS
@pytest.mark.promise("X5")
@pytest.mark.parametrize("name", ["config.json", "notes.txt", "unet/deep/x.json"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing", "chain", "dots"])
async def test_link_out_of_the_folder_is_rejected(
    world: FolderWorld, origin: Path, tmp_path: Path, name: str, target: str
) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text("PRIVATE KEY")
    link = origin / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    (origin / "chain").symlink_to(secret if target == "chain" else "config.json")
    link.symlink_to(
        {
            "file": secret,
            "folder": tmp_path,
            "nothing": tmp_path / "gone",
            "chain": origin / "chain",
            "dots": Path("../" * name.count("/") + "../../id_ed25519"),
        }[target]
    )
    with pytest.raises(InvalidRequestError, match="is a link that leaves the folder"):
        await pull(world.store, PullRequest(str(origin)))
    assert not any(b"PRIVATE" in path.read_bytes() for path in world.root.rglob("*") if path.is_file())
    assert world.leftovers() == set()


@LINKS
@pytest.mark.promise("X5")
async def test_file_that_is_not_regular_is_rejected(world: FolderWorld, origin: Path) -> None:
    os.mkfifo(origin / "extra.json")
    with pytest.raises(InvalidRequestError, match=r"extra\.json .* is not a regular file"):
        await pull(world.store, PullRequest(str(origin)))


@LINKS
@pytest.mark.promise("X5")
@pytest.mark.parametrize("swapped", ["file", "folder", "fifo"])
async def test_link_that_replaces_a_listed_file_is_not_followed(
    world: FolderWorld, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    lay_out(tmp_path / "outside", {"weights.bin": b"PRIVATE" + bytes(len(MODEL["unet/weights.bin"]) - 7)})
    look = layout.files_to_copy

    def looked(folder: Path) -> dict[str, layout.Found]:
        found = look(folder)
        if swapped == "folder":
            (origin / "unet").rename(tmp_path / "moved")
            (origin / "unet").symlink_to(tmp_path / "outside")
        else:
            (origin / "unet" / "weights.bin").unlink()
            if swapped == "file":
                (origin / "unet" / "weights.bin").symlink_to(tmp_path / "outside" / "weights.bin")
            else:
                os.mkfifo(origin / "unet" / "weights.bin")
        return found

    monkeypatch.setattr(pulling, "files_to_copy", looked)
    with pytest.raises(PullError, match="replaced during the copy"):
        await pull(world.store, PullRequest(str(origin)))
    assert world.leftovers() == set()


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A file system whose lower layer has a model, as a container's image may."""
    place, merged = tmp_path / "layers", tmp_path / "merged"
    place.mkdir()
    merged.mkdir()
    if sys.platform != "linux" or not _mounted("tmpfs", place, "size=200m"):
        pytest.skip("mounting is not permitted here")
    try:
        for name in ("lower", "upper", "work"):
            (place / name).mkdir()
        lay_out(place / "lower" / "me" / "baked", NEEDED)
        layers = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
        if not _mounted("overlay", merged, f"{layers},redirect_dir=off"):
            pytest.skip("overlayfs is not available here")
        try:
            yield merged
        finally:
            subprocess.run(["umount", str(merged)], check=True)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _mounted(kind: str, place: Path, options: str) -> bool:
    try:
        done = subprocess.run(
            ["mount", "-t", kind, kind, "-o", options, str(place)], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.promise("U3")
async def test_a_model_in_a_lower_layer_is_deleted_and_replaced(overlay: Path, origin: Path) -> None:
    with pytest.raises(OSError, match="cross-device"):
        (overlay / "me" / "baked").rename(overlay / "me" / "other")  # what this file system cannot do
    async with folder_world(overlay) as world:
        assert [model.name for model in await world.store.list()] == ["me/baked"]
        (origin / "config.json").write_bytes(b"{}")
        assert isinstance((await pull(world.store, PullRequest("me/baked", source=str(origin))))[-1], Success)
        assert (overlay / "me" / "baked" / "config.json").read_bytes() == b"{}"
        await world.store.delete("me/baked")
        assert await world.store.list() == []
        assert not (overlay / "me").exists()


@pytest.mark.promise("U3")
@pytest.mark.parametrize("replaced", [False, True])
async def test_a_folder_that_cannot_be_renamed_is_deleted_where_it_is(
    world: FolderWorld, origin: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    await pull(world.store, PullRequest("mine", source=str(origin)))
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == world.root / "mine":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    if replaced:
        (origin / "config.json").write_bytes(b"{}")
        await pull(world.store, PullRequest("mine", source=str(origin)))
        assert (world.root / "mine" / "config.json").read_bytes() == b"{}"
    await world.store.delete("mine")
    assert world.leftovers() == set()
    assert await world.store.list() == []


@pytest.mark.promise("X3")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no permission bits")
async def test_folders_and_files_are_private_for_any_umask(tmp_path: Path, origin: Path) -> None:
    before = os.umask(0)
    try:
        async with folder_world(tmp_path / "a" / "b" / "models") as world:
            await pull(world.store, PullRequest("me/mine", source=str(origin)))
            await pull(world.store, PullRequest(f"hf:{REPOSITORY}"))
            modes = {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "a").rglob("*")}
            assert modes | {stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o077} == {0}
    finally:
        os.umask(before)


@pytest.mark.promise("P18")
async def test_folder_without_a_model_leaves_nothing(world: FolderWorld, origin: Path) -> None:
    (origin / "config.json").write_bytes(b"no model")
    with pytest.raises(PullError, match="says so"):
        await pull(world.store, PullRequest(str(origin)))
    (origin / "config.json").unlink()
    with pytest.raises(PullError, match=r"My-Model: config\.json is missing"):
        await pull(world.store, PullRequest(str(origin)))
    assert world.leftovers() == set()
    assert await world.store.list() == []


@pytest.mark.promise("P18")
async def test_failed_replacement_keeps_the_old_model(
    world: FolderWorld, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PullRequest("me/mine", source=str(origin))
    await pull(world.store, request)
    (origin / "config.json").write_bytes(b"{}")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.parent.name.endswith(".files"):
            raise PermissionError(errno.EACCES, "in use", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PreconditionError, match="cannot be replaced"):
        await pull(world.store, request)
    monkeypatch.undo()
    model = await world.store.get("me/mine")
    assert (model.digest, world.content(model.path)) == (DIGEST, NEEDED)


async def test_folder_that_changes_during_the_copy_is_rejected(world: FolderWorld, origin: Path) -> None:
    async with asyncio.timeout(LIMIT), aclosing(world.store.pull(PullRequest(str(origin)))) as events:
        await until(events, ChunkProgress)  # the files are listed
        with (origin / "weights.bin").open("ab") as file:
            file.write(b"more")
        with pytest.raises(PullError, match="changed during the copy"):
            async for _ in events:
                pass
    assert world.leftovers() == set()


@pytest.mark.promise("P19")
async def test_disk_that_fills_during_the_copy(
    world: FolderWorld, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = Staging.sync

    def full(_: Staging) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Staging, "sync", full)
    with pytest.raises(PullError, match=f"No space left on device after {SIZE} of {SIZE} bytes"):
        await pull(world.store, PullRequest(f"hf:{REPOSITORY}"))
    assert await world.store.list() == []
    monkeypatch.setattr(Staging, "sync", sync)
    world.hub.fetched.clear()
    assert (await pull(world.store, PullRequest(f"hf:{REPOSITORY}")))[-1] == Success(REPOSITORY, SIZE, DIGEST)
    assert world.hub.fetched == []


async def test_a_cancelled_copy_leaves_nothing(world: FolderWorld, origin: Path) -> None:
    async with asyncio.timeout(LIMIT), aclosing(world.store.pull(PullRequest(str(origin)))) as events:
        await until(events, ChunkProgress)
    assert world.leftovers() == set()
    assert not (world.root / "My-Model").exists()


async def test_folder_put_there_by_hand_is_inspected_once(
    world: FolderWorld, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lay_out(root / "plain", NEEDED)
    lay_out(root / "owner" / "nested", NEEDED)
    lay_out(root / "owner" / "broken", {"config.json": b"no model"})
    lay_out(root / "no name", NEEDED)
    lay_out(root / ".hidden", NEEDED)
    (root / "empty" / "deeper").mkdir(parents=True)
    (root / "notes.txt").write_text("not ours")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert [model.name for model in await world.store.list()] == ["owner/nested", "plain"]
    skipped = [record.getMessage().partition(" is skipped: ")[0] for record in caplog.records]
    assert sorted(Path(path).name for path in skipped) == ["broken", "no name"]
    assert len(world.inspected) == 3
    model = await world.store.get("owner/nested")
    assert (model.digest, model.size, model.kind) == (DIGEST, SIZE, "chat")
    with pytest.raises(ModelUnusableError, match="says so"):
        await world.store.get("owner/broken")
    assert await world.another().get("owner/nested") == model
    assert len(world.inspected) == 3
    os.utime(root / "owner" / "nested" / "weights.bin", ns=(1 << 60, 1 << 60))
    assert (await world.store.get("owner/nested")).modified_at != model.modified_at
    await pull(world.store, PullRequest("plain", model_type="rerank"))
    assert (await world.another().get("plain")).kind == "rerank"
    assert (root / "plain").is_dir()
    assert world.content(root / "plain") == NEEDED


async def test_pull_of_a_folder_of_the_store_copies_nothing(world: FolderWorld, root: Path) -> None:
    folder = lay_out(root / "own", NEEDED)
    assert (await pull(world.store, PullRequest(str(folder))))[-1] == Success("own", SIZE, DIGEST)
    assert world.content(folder) == NEEDED


async def test_delete_takes_the_folder_its_record_and_an_empty_owner(world: FolderWorld, root: Path) -> None:
    lay_out(root / "owner" / "one", NEEDED)
    lay_out(root / "owner" / "two", NEEDED)
    assert len(await world.store.list()) == 2
    await world.store.delete("owner/one")
    assert [model.name for model in await world.store.list()] == ["owner/two"]
    await world.store.delete("owner/two")
    assert not (root / "owner").exists()
    assert {path.name for path in below(root)} == {root.name, ".partial", ".records"}


@pytest.mark.promise("P27")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only privileged users link")
async def test_deleting_a_link_leaves_its_target(world: FolderWorld, root: Path, origin: Path) -> None:
    await world.store.list()
    lay_out(root / "other", NEEDED)
    (root / "linked").symlink_to(origin)
    assert (await world.store.get("linked")).digest == tree_digest(MODEL)
    await world.store.delete("linked")
    assert not (root / "linked").is_symlink()
    assert (origin / "weights.bin").exists()


@pytest.mark.promise("P27")
async def test_a_crash_in_the_middle_of_a_replacement_is_undone(
    world: FolderWorld, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = PullRequest("me/mine", source=str(origin))
    await pull(world.store, request)
    layout = FolderLayout(world.root)
    layout.path("me/mine").rename(world.root / ".partial" / "me=mine.old")
    lay_out(world.root / ".partial" / "me=mine.deleted", NEEDED)
    assert await world.another().list() == []
    events = await pull(world.another(), request)
    assert events[-1] == Success("me/mine", SIZE, DIGEST)
    assert not any(isinstance(event, ChunkProgress) for event in events)
    assert world.leftovers() == set()


@pytest.mark.parametrize("name", ["../secret", "", "a/b/c", "/a", "a/", "a/..", "a/.b", "nul/x", "x/com1", 7])
async def test_unknown_name_is_not_found_and_changes_nothing(world: FolderWorld, root: Path, name: str) -> None:
    lay_out(root.parent / "secret", NEEDED)
    lay_out(root / "a" / "b", NEEDED)
    for ask in (world.store.get, world.store.delete):
        with pytest.raises(ModelNotFoundError, match=r"^model: "):
            await ask(name)
    assert world.content(root.parent / "secret") == world.content(root / "a" / "b") == NEEDED


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Me/mine", "in the case of the owner"),
        ("me/MINE", "differs only by case from 'me/mine'"),
        ("me", "cannot exist besides 'me/mine'"),
        ("alone/x", "cannot exist besides 'alone'"),
        ("ALONE", "differs only by case from 'alone'"),
    ],
)
async def test_names_that_differ_by_case_are_rejected(
    world: FolderWorld, root: Path, origin: Path, name: str, text: str
) -> None:
    lay_out(root / "me" / "mine", NEEDED)
    lay_out(root / "alone", NEEDED)
    with pytest.raises(InvalidRequestError, match=text):
        await pull(world.store, PullRequest(name, source=str(origin)))
    assert [model.name for model in await world.store.list()] == ["alone", "me/mine"]


@pytest.mark.promise("P10")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no permission bits")
async def test_only_this_user_can_read_the_store(world: FolderWorld, origin: Path, root: Path) -> None:
    await pull(world.store, PullRequest("me/mine", source=str(origin)))
    for path in below(root):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_record_has_the_source_of_the_model(world: FolderWorld, origin: Path, root: Path) -> None:
    await pull(world.store, PullRequest("me/mine", source=str(origin)))
    record = json.loads((root / ".records" / "me" / "mine.json").read_text())
    assert (record["source"], record["digest"]) == (str(origin), DIGEST)
    assert replace(await world.store.get("me/mine"), bundled=True).to_wire()["details"]["context_length"] == 128


def test_delete_tree_of_files_links_and_nothing(tmp_path: Path) -> None:
    layout.delete_tree(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    layout.delete_tree(tmp_path / "file")
    shutil.copytree(Path(__file__).parent, tmp_path / "folder")
    layout.delete_tree(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
