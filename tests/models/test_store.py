from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import stat
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine_plugin.download.disk import disk_error
from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.download.partial import Partial
from engine_plugin.errors import (
    EngineNotInstalledError,
    InvalidRequestError,
    ModelNotFoundError,
    ModelUnusableError,
    PreconditionError,
    PullError,
    UnavailableError,
)
from engine_plugin.models import index
from engine_plugin.models.store import Inspection, ModelStore, PullRequest, bundled_samples
from engine_plugin.system.files import write_json
from tests.models.fakes import SAMPLES, Inspector, digest_of, files_below, pull
from tests.patience import LIMIT


def lay_in(root: Path, name: str, data: bytes) -> Path:
    root.mkdir(exist_ok=True)
    path = root / f"{name}.gguf"
    path.write_bytes(data)
    return path


async def test_a_fresh_store_lists_the_samples_and_creates_nothing(store: ModelStore, root: Path) -> None:
    assert [model.name for model in await store.list()] == ["tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf"]
    assert (await store.get("tiny-chat-gguf")).bundled
    assert await store.defaults_for(["rerank"]) == {"rerank": "tiny-rerank-gguf"}
    assert list(root.parent.iterdir()) == []


@pytest.mark.promise("T3")
async def test_the_model_that_was_pulled_last_is_the_default_of_its_kind(
    store: ModelStore, tmp_path: Path, data: bytes
) -> None:
    await pull(store, PullRequest("tiny-chat-gguf"))
    assert await store.is_sample("tiny-chat-gguf")
    assert await store.defaults_for(["chat"]) == {"chat": "tiny-chat-gguf"}
    for name in ("zebra", "antelope"):
        await pull(store, PullRequest(str(lay_in(tmp_path / "elsewhere", name, data + name.encode()))))
    assert not await store.is_sample("zebra")
    assert await store.defaults_for(["chat"]) == {"chat": "antelope"}
    await store.delete("antelope")
    assert await store.defaults_for(["chat"]) == {"chat": "zebra"}
    await pull(store, PullRequest("copy", source="model:tiny-chat-gguf"))
    assert await store.defaults_for(["chat"]) == {"chat": "zebra"}


async def test_a_store_without_samples_is_empty(root: Path, inspector: Inspector) -> None:
    store = ModelStore(root, inspect=inspector)
    assert await store.list() == []
    assert await store.defaults_for(["chat"]) == {"chat": ""}


async def test_a_pulled_sample_is_copied_verified_and_shadows_the_bundled_one(
    store: ModelStore, root: Path, data: bytes
) -> None:
    events = await pull(store, PullRequest("tiny-chat-gguf"))
    digest = f"sha256:{digest_of(data)}"
    assert events[-1] == Success("tiny-chat-gguf", len(data), digest)
    assert ChunkProgress(digest, len(data), len(data)) in events
    assert isinstance(events[0], StepStarted)
    model = await store.get("tiny-chat-gguf")
    assert (model.bundled, model.path, model.digest, model.kind) == (
        False,
        root / "tiny-chat-gguf.gguf",
        digest,
        "chat",
    )
    assert model.path.read_bytes() == data
    assert [found.name for found in await store.list()].count("tiny-chat-gguf") == 1
    assert files_below(root) == {"tiny-chat-gguf.gguf", "tiny-chat-gguf.json"}
    await store.delete("tiny-chat-gguf")
    assert (await store.get("tiny-chat-gguf")).bundled


async def test_a_local_file_is_copied_under_its_own_or_another_name(
    store: ModelStore, tmp_path: Path, data: bytes
) -> None:
    source = lay_in(tmp_path / "elsewhere", "Some.Model", data)
    assert (await pull(store, PullRequest(str(source))))[-1] == Success(
        "Some.Model", len(data), f"sha256:{digest_of(data)}"
    )
    await pull(store, PullRequest("other", source=source.as_uri(), model_type="embed"))
    models = {model.name: model for model in await store.list() if not model.bundled}
    assert {name: model.kind for name, model in models.items()} == {"Some.Model": "chat", "other": "embed"}
    assert source.read_bytes() == data


async def test_file_in_a_folder_that_cannot_be_listed_is_copied(
    store: ModelStore, tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder of another user with the mode 0711, which can be searched but not opened."""
    folder = tmp_path / "searchable"
    folder.mkdir()
    (folder / "mine.gguf").write_bytes(data)
    really_open = os.open

    def open_files_only(path: Any, *arguments: Any, **more: Any) -> int:
        if path == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", open_files_only)
    monkeypatch.setattr(os, "supports_dir_fd", {*os.supports_dir_fd, open_files_only})
    assert isinstance((await pull(store, PullRequest(str(folder / "mine.gguf"))))[-1], Success)


async def test_unchanged_file_is_not_copied_again(store: ModelStore, tmp_path: Path, data: bytes) -> None:
    source = lay_in(tmp_path / "elsewhere", "m", data)
    request = PullRequest(str(source))
    await pull(store, request)
    model = await store.get("m")
    events = await pull(store, request)
    assert isinstance(events[-1], Success)
    assert not any(isinstance(event, ChunkProgress) for event in events)
    assert (await store.get("m")).modified_at == model.modified_at
    source.write_bytes(data + b"more")
    assert (await pull(store, request))[-1] == Success("m", len(data) + 4, f"sha256:{digest_of(data + b'more')}")
    assert (await store.get("m")).size == len(data) + 4


async def test_pull_of_a_file_of_the_store_copies_nothing(store: ModelStore, root: Path, data: bytes) -> None:
    path = lay_in(root, "own", data)
    assert (await pull(store, PullRequest(str(path))))[-1] == Success("own", len(data), f"sha256:{digest_of(data)}")
    assert path.read_bytes() == data


async def test_a_present_name_needs_no_source(store: ModelStore, root: Path, data: bytes) -> None:
    lay_in(root, "mine", data)
    assert await pull(store, PullRequest("mine", model_type="embed")) == [
        Success("mine", len(data), f"sha256:{digest_of(data)}")
    ]
    assert (await store.get("mine")).kind == "embed"
    with pytest.raises(PullError, match=digest_of(data)):
        await pull(store, PullRequest("mine", sha256="0" * 64))


@pytest.mark.promise("P18")
async def test_a_wrong_digest_leaves_nothing(store: ModelStore, root: Path, tmp_path: Path, data: bytes) -> None:
    source = lay_in(tmp_path / "elsewhere", "m", data)
    with pytest.raises(PullError) as caught:
        await pull(store, PullRequest(str(source), sha256="0" * 64))
    assert "0" * 64 in caught.value.message
    assert digest_of(data) in caught.value.message
    assert files_below(root) == set()


@pytest.mark.promise("P18")
async def test_file_without_a_model_is_not_installed(store: ModelStore, root: Path, tmp_path: Path) -> None:
    source = lay_in(tmp_path / "elsewhere", "m", b"not a model")
    with pytest.raises(PullError, match="does not begin with GGUF"):
        await pull(store, PullRequest(str(source)))
    assert files_below(root) == set()


@pytest.mark.promise("P18")
async def test_empty_file_is_not_a_model(store: ModelStore, root: Path, tmp_path: Path) -> None:
    with pytest.raises(PullError, match="the file is empty"):
        await pull(store, PullRequest(str(lay_in(tmp_path / "elsewhere", "m", b""))))
    assert files_below(root) == set()


@pytest.mark.promise("P18")
async def test_failed_replacement_keeps_the_old_model(store: ModelStore, tmp_path: Path, data: bytes) -> None:
    source = lay_in(tmp_path / "elsewhere", "m", data)
    await pull(store, PullRequest(str(source)))
    source.write_bytes(b"broken now")
    with pytest.raises(PullError):
        await pull(store, PullRequest(str(source)))
    model = await store.get("m")
    assert model.path.read_bytes() == data
    assert model.digest == f"sha256:{digest_of(data)}"


async def test_the_record_survives_a_restart_without_another_inspection(
    store: ModelStore, root: Path, tmp_path: Path, data: bytes
) -> None:
    source = lay_in(tmp_path / "elsewhere", "m", data)
    await pull(store, PullRequest(str(source), model_type="rerank"))
    again = Inspector()
    second = ModelStore(root, inspect=again)
    model = await second.get("m")
    assert model == await store.get("m")
    assert model.kind == "rerank"
    assert model.details.extra == {"context_length": 8192}
    assert again.seen == []


async def test_file_put_there_by_hand_is_inspected_once(
    store: ModelStore, inspector: Inspector, root: Path, data: bytes
) -> None:
    path = lay_in(root, "by-hand", data)
    for _ in range(2):
        model = next(model for model in await store.list() if model.name == "by-hand")
        assert (model.kind, model.size, model.digest) == ("chat", len(data), f"sha256:{digest_of(data)}")
    assert inspector.seen == [path]
    assert abs((datetime.now(UTC) - model.modified_at).total_seconds()) < 3600
    second = ModelStore(root, inspect=inspector)
    assert await second.get("by-hand") == model
    assert inspector.seen == [path]
    os.utime(path, ns=(1, 1))
    assert (await store.get("by-hand")).modified_at.year == 1970
    assert inspector.seen == [path, path]


async def test_requested_kind_survives_another_inspection(store: ModelStore, root: Path, data: bytes) -> None:
    path = lay_in(root, "m", data)
    await pull(store, PullRequest("m", model_type="embed"))
    os.utime(path, ns=(1, 1))
    assert (await store.get("m")).kind == "embed"


@pytest.mark.promise("P27")
async def test_damaged_record_is_written_anew(
    store: ModelStore, inspector: Inspector, root: Path, data: bytes
) -> None:
    path = lay_in(root, "m", data)
    for text in ("{", "[]", "{}", '{"kind": "chat", "size": "x"}'):
        (root / "m.json").write_text(text)
        fresh = ModelStore(root, inspect=inspector)
        assert (await fresh.get("m")).digest == f"sha256:{digest_of(data)}"
        assert json.loads((root / "m.json").read_text())["size"] == path.stat().st_size
        path.touch()


@pytest.mark.promise("P27")
async def test_broken_files_are_skipped_with_one_warning_each(
    store: ModelStore, inspector: Inspector, root: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    lay_in(root, "good", data)
    broken = lay_in(root, "broken", b"nothing")
    lay_in(root, "no name", data)
    (root / "folder.gguf").mkdir()
    (root / "notes.txt").write_text("not ours")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert [model.name for model in await store.list() if not model.bundled] == ["good"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(Path(text.split(" is skipped: ")[0]).name for text in warnings) == ["broken.gguf", "no name.gguf"]
    assert inspector.seen.count(broken) == 1
    with pytest.raises(ModelUnusableError, match="does not begin with GGUF"):
        await store.get("broken")
    broken.write_bytes(data)
    assert (await store.get("broken")).kind == "chat"
    broken.unlink()
    with pytest.raises(ModelNotFoundError, match="no model is called"):
        await store.get("broken")
    broken.write_bytes(b"nothing at all")
    await store.delete("broken")
    assert not broken.exists()


async def test_failed_inspection_is_repeated(root: Path, data: bytes) -> None:
    answers: list[Inspection | None] = [None, Inspection("embed")]

    async def inspect(path: Path) -> Inspection:
        answer = answers.pop(0)
        if answer is None:
            raise EngineNotInstalledError("no parser yet")
        return answer

    lay_in(root, "m", data)
    store = ModelStore(root, inspect=inspect)
    assert await store.list() == []
    assert [model.kind for model in await store.list()] == ["embed"]


@pytest.mark.promise("P5")
async def test_list_during_a_delete_has_the_other_models(root: Path, data: bytes) -> None:
    """Its inspection is cut off; those who wait for it are not."""
    begun, wanted = asyncio.Event(), Inspector()

    async def inspect(path: Path) -> Inspection:
        if path.stem == "m":
            begun.set()
            await asyncio.Event().wait()
        return await wanted(path)

    lay_in(root, "m", data)
    lay_in(root, "other", data)
    store = ModelStore(root, inspect=inspect)
    asking = [asyncio.create_task(store.list()), asyncio.create_task(store.get("m"))]
    async with asyncio.timeout(LIMIT):
        await begun.wait()
        await store.delete("m")
        listed, got = await asyncio.gather(*asking, return_exceptions=True)
    assert isinstance(listed, list)
    assert [model.name for model in listed] == ["other"]
    assert isinstance(got, ModelNotFoundError)
    begun.clear()
    lay_in(root, "m", data)
    late = asyncio.create_task(store.list())
    async with asyncio.timeout(LIMIT):
        await begun.wait()
        await store.aclose()
        with pytest.raises(UnavailableError, match="the plugin is stopping"):
            await late


@pytest.mark.promise("P17")
async def test_list_during_an_installation_waits_for_the_record(
    store: ModelStore, root: Path, inspector: Inspector, tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be taken for one that was laid in by hand, and what the pull knew of it would be lost."""
    source = lay_in(tmp_path / "elsewhere", "m", data)
    replaced, go = threading.Event(), threading.Event()

    def slowly(*arguments: Any) -> None:
        replaced.set()
        assert go.wait(LIMIT)
        write_json(*arguments)

    monkeypatch.setattr(index, "write_json", slowly)
    pulling = asyncio.create_task(pull(store, PullRequest(str(source), model_type="embed")))
    async with asyncio.timeout(LIMIT):
        await asyncio.to_thread(replaced.wait, LIMIT)
        listing = asyncio.create_task(store.list())
        await asyncio.wait({listing}, timeout=0.2)
        go.set()
        await pulling
        found = {model.name: model for model in await listing}
    assert (found["m"].kind, found["m"].digest) == ("embed", f"sha256:{digest_of(data)}")
    assert len(inspector.seen) == 1
    assert json.loads((root / "m.json").read_text())["kind_given"]


async def test_delete_removes_the_model_and_its_record(
    store: ModelStore, root: Path, tmp_path: Path, data: bytes
) -> None:
    source = lay_in(tmp_path / "elsewhere", "m", data)
    await pull(store, PullRequest(str(source)))
    await store.delete("m")
    assert files_below(root) == set()
    with pytest.raises(ModelNotFoundError, match="no model is called 'm'"):
        await store.delete("m")
    assert source.exists()


async def test_a_bundled_sample_is_not_deleted(store: ModelStore) -> None:
    with pytest.raises(PreconditionError, match="comes with the plugin's package"):
        await store.delete("tiny-chat-gguf")
    assert (await store.get("tiny-chat-gguf")).path.exists()


@pytest.mark.promise("P27")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only privileged users link")
async def test_deleting_a_link_leaves_its_target(store: ModelStore, root: Path, tmp_path: Path, data: bytes) -> None:
    target = lay_in(tmp_path / "elsewhere", "big", data)
    lay_in(root, "other", data)
    (root / "linked.gguf").symlink_to(target)
    assert (await store.get("linked")).size == len(data)
    await store.delete("linked")
    assert target.exists()
    assert not (root / "linked.gguf").exists()


@pytest.mark.parametrize("name", ["../secret", "", "a/b", "Tiny-Chat", "tiny-cha"])
async def test_unknown_name_is_not_found_and_changes_nothing(
    store: ModelStore, root: Path, data: bytes, name: str
) -> None:
    lay_in(root.parent, "secret", data)
    for ask in (store.get, store.delete):
        with pytest.raises(ModelNotFoundError, match=r"^model: "):
            await ask(name)
    assert (root.parent / "secret.gguf").exists()


async def test_not_found_suggests_near_names(store: ModelStore) -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean tiny-rerank-gguf"):
        await store.get("tiny-rrank")
    with pytest.raises(ModelNotFoundError, match="Here are: tiny-chat-gguf, tiny-embed-gguf, tiny-rerank-gguf"):
        await store.get("zzzzzz")


async def test_name_that_differs_by_case_is_rejected(
    store: ModelStore, root: Path, tmp_path: Path, data: bytes
) -> None:
    source = lay_in(tmp_path / "elsewhere", "Model", data)
    await pull(store, PullRequest(str(source)))
    for name, other in (("mODEL", "Model"), ("Tiny-Chat-GGUF", "tiny-chat-gguf")):
        with pytest.raises(InvalidRequestError, match=f"differs only by case from '{other}'"):
            await pull(store, PullRequest(name, source=str(source)))
    assert files_below(root) == {"Model.gguf", "Model.json"}


@pytest.mark.promise("P10")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no permission bits")
async def test_only_this_user_can_read_the_store(store: ModelStore, root: Path) -> None:
    await pull(store, PullRequest("tiny-embed-gguf"))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (root, root / ".partial")] == [0o700, 0o700]
    files = [*files_below(root), ".partial/tiny-embed-gguf.lock"]
    assert {stat.S_IMODE((root / file).stat().st_mode) for file in files} == {0o600}


@pytest.mark.promise("P19")
async def test_full_disk_fails_before_the_copy(
    store: ModelStore, root: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(data)))
    with pytest.raises(PullError, match=rf"\({len(data)} bytes\)") as caught:
        await pull(store, PullRequest("copy", source=str(SAMPLES / "tiny-chat.gguf")))
    assert "Free some space" in caught.value.message
    assert files_below(root) == set()


async def test_store_has_the_given_samples(root: Path, inspector: Inspector) -> None:
    store = ModelStore(root, inspect=inspector, samples=bundled_samples())
    model = await store.get("tiny-rerank-gguf")
    assert replace(model, bundled=False) != model
    assert model.to_wire()["name"] == model.to_wire()["model"] == "tiny-rerank-gguf"
    assert datetime.fromisoformat(model.to_wire()["modified_at"]).tzinfo is not None


def _highest_descriptor() -> int:
    return max(int(entry.name) for entry in Path("/dev/fd").iterdir())


@pytest.mark.promise("X12")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
async def test_hundreds_of_concurrent_pulls_open_few_files(store: ModelStore, tmp_path: Path) -> None:
    import resource

    paths = [tmp_path / f"model-{number}.gguf" for number in range(200)]
    for number, path in enumerate(paths):
        path.write_bytes(b"GGUF %d" % number)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    await pull(store, PullRequest("tiny-embed-gguf"))  # all threads are there
    resource.setrlimit(resource.RLIMIT_NOFILE, (_highest_descriptor() + 100, limits[1]))
    try:
        pulled = await asyncio.gather(*(pull(store, PullRequest(str(path))) for path in paths))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert {events[-1].model for events in pulled if isinstance(events[-1], Success)} == {path.stem for path in paths}
    assert StepStarted("waiting for other pulls to end") in pulled[-1]


@pytest.mark.promise("X12")
@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "ulimit -n"), (errno.EACCES, "permissions")]
)
def test_error_has_fitting_advice(tmp_path: Path, number: int, advice: str) -> None:
    assert advice in disk_error(OSError(number, os.strerror(number)), tmp_path, 0, 0).message


@pytest.mark.promise("X10")
async def test_a_copy_that_fills_the_disk_leaves_nothing(
    store: ModelStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_partial: Partial) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Partial, "sync", full)
    with pytest.raises(PullError, match="No space left") as caught:
        await pull(store, PullRequest("copy", source=str(SAMPLES / "tiny-chat.gguf")))
    assert "Deleting the model" not in caught.value.message
    assert files_below(root) == set()
