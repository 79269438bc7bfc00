"""Access to hubs: tokens, gated repositories, addresses, and environments that forbid it."""

from __future__ import annotations

import logging

import pytest

from engine_plugin.errors import (
    AuthError,
    InvalidRequestError,
    ModelNotFoundError,
    PreconditionError,
)
from engine_plugin.models.store import PullRequest
from tests.models.fakes import pull
from tests.models.folderworld import DONE, SOURCES, FolderWorld, lay_out
from tests.models.hub import MODEL, REPOSITORY, hub_server
from tests.models.server import Script

LONG = f"http:/me:{'pa55w' * 50}@host/{{}}"


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
