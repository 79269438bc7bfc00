"""Pulls from repositories on hubs."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import shutil
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.download.events import ChunkProgress, Status, Success
from engine_plugin.errors import (
    AuthError,
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    PreconditionError,
    PullError,
)
from engine_plugin.models.hubs import checked_files, hubs_of
from engine_plugin.models.store import PullRequest
from tests.models.fakes import pull
from tests.models.folderworld import NEEDED, POLICY, SIZE, FolderWorld, folder_world, lay_out, tree_digest
from tests.models.hub import COMMIT, MODEL, REPOSITORY, hub_server
from tests.models.server import Script
from tests.models.test_resume import until_progress
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

MISSPELT = ("http:/me:pa55w", "https:me:pa55w", "http://me:pa55w/x")
LONG = f"http:/me:{'pa55w' * 50}@host/{{}}"
SOURCES = (f"hf:{REPOSITORY}", f"ms:{REPOSITORY}")
DONE = Success(REPOSITORY, SIZE, tree_digest(NEEDED))


@pytest.fixture
async def world(root: Path) -> AsyncIterator[FolderWorld]:
    async with folder_world(root) as world:
        yield world


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


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (Script(status=401, body=b"{}"), EnginePluginError, "token|refused"),
        (Script(status=403, body=b"{}"), AuthError, "refused access"),
        (Script(status=404, body=b"{}"), ModelNotFoundError, "no such"),
        (Script(status=418, body=b"{}"), PullError, "HTTP 418"),
        (Script(status=200, body=b"no json", headers={"Content-Type": "application/json"}), PullError, "no"),
        (Script(status=200, body=b"{}", headers={"Content-Type": "application/json"}), PullError, "list of files"),
        (Script(status=200, body=b"[]", headers={"Content-Type": "application/json"}), PullError, "list of files"),
        (Script(status=429, headers={"Retry-After": "7000"}), PullError, "busy for 7000 seconds"),
    ],
)
async def test_refusals_of_a_hub(
    world: FolderWorld, source: str, script: Script, error: type[EnginePluginError], text: str
) -> None:
    world.hub.troubles["list"].append(replace(script))
    with pytest.raises(error, match=text) as caught:
        await pull(world.store, PullRequest(source))
    assert source in caught.value.message or "/api/" in caught.value.message
    assert world.leftovers() == set()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("script", [Script(status=503), Script(status=429), Script(drop_after=0, status=200)])
async def test_failed_request_to_a_hub_is_repeated(world: FolderWorld, source: str, script: Script) -> None:
    world.hub.troubles["list"].extend([replace(script), replace(script)])
    events = await pull(world.store, PullRequest(source))
    assert events[-1] == DONE
    assert sum(isinstance(event, Status) and "trying again" in event.text for event in events) == 2
    world.hub.troubles["list"].extend(replace(script) for _ in range(3))
    with pytest.raises(PullError, match="3 attempts"):
        await pull(world.another(), PullRequest(source))


@pytest.mark.parametrize("source", SOURCES)
async def test_hub_that_refuses_connections(world: FolderWorld, source: str) -> None:
    async with hub_server() as gone:
        world.environ = {"HF_ENDPOINT": gone.url(""), "MODELSCOPE_ENDPOINT": gone.url("")}
    with pytest.raises(PullError, match="cannot connect"):
        await pull(world.another(), PullRequest(source))


async def test_silent_hub_times_out(world: FolderWorld) -> None:
    world.hub.troubles["list"].extend(Script(status=200, body=b"{}", stall_after=1) for _ in range(2))
    store = world.another(replace(POLICY, stall_s=0.1, attempts=2))
    with pytest.raises(PullError, match="2 attempts"):
        await pull(store, PullRequest(SOURCES[0]))


async def test_cancel_does_not_wait_for_a_silent_hub(world: FolderWorld) -> None:
    world.hub.troubles["list"].append(Script(status=200, body=b"{}", stall_after=1))
    store = world.another(replace(POLICY, stall_s=3600))
    async with asyncio.timeout(LIMIT):
        async with aclosing(store.pull(PullRequest(SOURCES[0]))) as events:
            await anext(events)
            await world.hub.asked.wait()
        await world.hub.close_connections()
    assert world.leftovers() == set()


@pytest.mark.promise("P20")
async def test_token_is_sent_to_its_hub_only(world: FolderWorld, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    world.hub.token = "hf_secret"
    world.hub.refusal = Script(status=401, body=b"{}", headers={"X-Error-Code": "RepoNotFound"})
    async with hub_server() as storage:
        world.hub.storage = storage.url("")
        with pytest.raises(ModelNotFoundError, match="HF_TOKEN"):
            await pull(world.store, PullRequest(SOURCES[0]))
        events = await pull(world.store, PullRequest(SOURCES[0], password="hf_secret"))
        assert events[-1] == DONE
        assert {name for name, _ in storage.fetched} == {"weights.bin", "unet/weights.bin"}
        assert all("authorization" not in request.headers for request in storage.requests)
    told = [request.headers["authorization"] for request in world.hub.requests if "authorization" in request.headers]
    assert set(told) == {"Bearer hf_secret"}
    assert "hf_secret" not in caplog.text + repr(events)
    assert not any("hf_secret" in path.read_text("latin-1") for path in world.root.rglob("*") if path.is_file())


@pytest.mark.parametrize(("source", "variable"), [(SOURCES[0], "HF_TOKEN"), (SOURCES[1], "MODELSCOPE_API_TOKEN")])
@pytest.mark.promise("L1")
async def test_token_from_the_environment(world: FolderWorld, source: str, variable: str) -> None:
    world.hub.token, world.hub.refusal = "t0ken", Script(status=401, body=b"{}")
    world.environ[variable] = " t0ken\n"
    assert (await pull(world.another(), PullRequest(source)))[-1] == DONE


@pytest.mark.promise("L1")
@pytest.mark.parametrize("source", SOURCES)
async def test_white_space_around_a_password_is_removed(world: FolderWorld, source: str) -> None:
    world.hub.token, world.hub.refusal = "t0ken", Script(status=401, body=b"{}")
    assert (await pull(world.store, PullRequest(source, password="\tt0ken \r\n")))[-1] == DONE


@pytest.mark.promise("L1")
@pytest.mark.parametrize(
    "source", ["http:/me:pa55w@host/{}", "https:me:pa55w@host/{}", "http://me:pa55w/x@host/{}", LONG]
)
async def test_a_misspelt_url_does_not_show_its_password(world: FolderWorld, source: str) -> None:
    with pytest.raises((InvalidRequestError, ModelNotFoundError)) as caught:
        await pull(world.store, PullRequest(source.format(REPOSITORY)))
    assert "pa55w" not in caught.value.message


async def test_redirect_of_the_list_is_followed_without_the_token(world: FolderWorld) -> None:
    async with hub_server() as other:
        target = other.url(f"/api/models/{REPOSITORY}/revision/main?blobs=true")
        world.hub.troubles["list"].append(Script(status=302, body=b"", headers={"Location": target}))
        await pull(world.store, PullRequest(SOURCES[0], password="t0ken"))
        assert [request.headers.get("authorization") for request in other.requests] == [None]


async def test_token_over_plain_http_is_rejected(world: FolderWorld) -> None:
    world.environ = {"HF_ENDPOINT": "http://hub.example", "MODELSCOPE_ENDPOINT": "http://hub.example"}
    for source in SOURCES:
        with pytest.raises(InvalidRequestError, match="unprotected"):
            await pull(world.another(), PullRequest(source, password="t"))


async def test_a_gated_repository_says_what_to_do(world: FolderWorld) -> None:
    world.hub.token, world.hub.refusal = (
        "right",
        Script(status=403, body=b"{}", headers={"X-Error-Code": "GatedRepo"}),
    )
    with pytest.raises(AuthError, match="Request access on its page") as caught:
        await pull(world.store, PullRequest(SOURCES[0], password="wrong"))
    assert "accept the licence" in caught.value.message


async def test_refused_file_of_a_listed_gated_repository(world: FolderWorld) -> None:
    world.hub.troubles["config.json"].append(Script(status=403, body=b"gated"))
    with pytest.raises(AuthError, match="accept the licence"):
        await pull(world.store, PullRequest(SOURCES[0]))


async def test_missing_revision(world: FolderWorld) -> None:
    world.hub.troubles["list"].append(Script(status=404, body=b"{}", headers={"X-Error-Code": "RevisionNotFound"}))
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        await pull(world.store, PullRequest(f"{SOURCES[0]}@v9"))


@pytest.mark.promise("L6")
@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE=1"),
        ({"HF_HUB_OFFLINE": "yes"}, "HF_HUB_OFFLINE=yes"),
        ({"HF_HUB_OFFLINE": " True "}, "HF_HUB_OFFLINE=True"),
        ({"TRANSFORMERS_OFFLINE": "ON"}, "TRANSFORMERS_OFFLINE=ON"),
        ({"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "1"}, "TRANSFORMERS_OFFLINE=1"),
    ],
)
async def test_offline_environment_rejects_pulls_from_hugging_face(
    world: FolderWorld, variables: dict[str, str], named: str
) -> None:
    world.environ |= variables
    store = world.another()
    for source in (SOURCES[0], REPOSITORY, f"{world.hub.url('')}/{REPOSITORY}"):
        with pytest.raises(PreconditionError, match=named):
            await pull(store, PullRequest(source))
    assert world.hub.requests == []
    assert (await pull(store, PullRequest("from-disk", source=str(lay_out(world.root.parent / "a", MODEL)))))[-1]
    assert (await pull(store, PullRequest(SOURCES[1])))[-1] == DONE  # the variable is not ModelScope's


@pytest.mark.promise("L6")
@pytest.mark.parametrize("value", ["0", "", "off", "false", "2"])
async def test_online_environment_allows_pulls(world: FolderWorld, value: str) -> None:
    world.environ |= {"HF_HUB_OFFLINE": value}
    if value:
        world.environ |= {"TRANSFORMERS_OFFLINE": "1"}  # the first that is set counts
    assert (await pull(world.another(), PullRequest(SOURCES[0])))[-1] == DONE


@pytest.mark.promise("X15")
@pytest.mark.parametrize(("source", "variable"), [(SOURCES[0], "HF_ENDPOINT"), (SOURCES[1], "MODELSCOPE_ENDPOINT")])
@pytest.mark.parametrize("endpoint", ["http://[::1", "ftp://me:pa55w0rd@hub", "http://hub:99999", "hub x"])
async def test_an_endpoint_that_is_not_a_url_is_named(
    world: FolderWorld, source: str, variable: str, endpoint: str
) -> None:
    world.environ[variable] = endpoint
    with pytest.raises(PreconditionError, match=f"{variable}: .* is not an http.* URL") as caught:
        await pull(world.another(), PullRequest(source))
    assert "pa55w0rd" not in caught.value.message


@pytest.mark.promise("X11")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("script", "text"),
    [
        (
            lambda: Script(status=200, body=gzip.compress(bytes(64 << 20)), headers={"Content-Encoding": "gzip"}),
            "compressed",
        ),
        (lambda: Script(status=200, body=b" " * (17 << 20), chunked=True), "larger than 16 MiB"),
        (
            lambda: Script(status=200, body=b'{"siblings": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
            "nested more than 100 deep",
        ),
        (lambda: Script(status=302, body=b"", headers={"Location": "http://127.0.0.1:99999/"}), "invalid URL"),
        (lambda: Script(status=302, body=b"", headers={"Location": "http://[::1/"}), "invalid URL"),
    ],
    ids=["bomb", "endless", "depth", "port", "brackets"],
)
async def test_a_hubs_list_is_bounded(
    world: FolderWorld, source: str, script: Callable[[], Script], text: str
) -> None:
    world.hub.troubles["list"].append(script())
    with pytest.raises(PullError, match=text):
        await pull(world.store, PullRequest(source))
    assert world.leftovers() == set()


@pytest.mark.promise("X11")
@pytest.mark.parametrize("source", SOURCES)
async def test_a_dripping_list_ends_with_its_time_or_with_its_caller(world: FolderWorld, source: str) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)

    slow = Script(status=200, body=b" ", length=1 << 20, stall_after=0)
    dripping: list[asyncio.Task[None]] = []

    ordinary, asked = world.hub.send, asyncio.Semaphore(0)

    async def send(writer: asyncio.StreamWriter, script: Script) -> None:
        if script is slow:
            dripping.append(asyncio.create_task(drip(writer)))
            asked.release()
        await ordinary(writer, script)

    world.hub.send = send  # type: ignore[method-assign]
    try:
        world.hub.troubles["list"].extend([slow, slow])
        hurried = replace(POLICY, connect_s=0.1, stall_s=0.1, attempts=1)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(PullError, match="no answer within"):
                await pull(world.another(hurried), PullRequest(source))
            async with aclosing(world.store.pull(PullRequest(source))) as events:
                await anext(events)
                for _ in range(2):
                    await asked.acquire()
            assert (await pull(world.store, PullRequest(source)))[-1] == DONE
    finally:
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["sha", "siblings", "rfilename", "size", "lfs", "sha256", "blobId", "Code", "Data", "Files"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.promise("X15")
@given(listed=st.lists(JSON, max_size=3), answer=JSON)
async def test_any_list_of_a_hub_gives_files_or_an_error(listed: list[Any], answer: Any) -> None:
    for hub in hubs_of({}, POLICY).values():
        source = hub.source(REPOSITORY, "", "", "model", insecure=False)
        for shape in (
            answer,
            {"sha": "c", "siblings": listed},
            {"Code": 200, "Data": {"Files": listed}},
        ):
            with suppress(EnginePluginError):
                assert len(checked_files(hub.read_listing(shape, source).files, source.label)) <= len(listed)


def entry(path: object, size: object = 1, **more: Any) -> dict[str, Any]:
    return {"rfilename": path, "size": size, "blobId": "0" * 40, **more}


@pytest.mark.promise("P22")
@pytest.mark.parametrize(
    ("listed", "text"),
    [
        ([entry("../config.json")], "config.json is missing"),
        ([entry("config.json"), entry("../../evil.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("/etc/passwd")], "is not a safe file name"),
        ([entry("config.json"), entry("a\\..\\b.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("C:evil.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("unet//x.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("x\0.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("sub/NUL.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("Config.json")], "ignore case"),
        ([entry("config.json"), entry("a/x"), entry("A/y")], "ignore case"),
        ([entry("config.json"), entry("a/x"), entry("a")], "ignore case"),
        ([entry("config.json"), entry("a"), entry("a/x")], "ignore case"),
        ([entry("config.json", None)], "no valid size"),
        ([entry("config.json", -1)], "no valid size"),
        ([entry("config.json", "big")], "no valid size"),
        ([entry("config.json", blobId="zz")], "no valid digest"),
        ([], "config.json is missing"),
    ],
)
async def test_invalid_list_writes_nothing(world: FolderWorld, listed: list[dict[str, Any]], text: str) -> None:
    world.hub.listed = listed
    with pytest.raises(PullError, match=text):
        await pull(world.store, PullRequest(SOURCES[0]))
    assert world.hub.fetched == []
    assert world.leftovers() == set()
    assert {path.name for path in world.root.parent.iterdir()} == {world.root.name}


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
