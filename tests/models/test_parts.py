"""Pulls of GGUF models in several parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import StepStarted, Success
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError, PullError
from engine_plugin.models.gguf import read_header
from engine_plugin.models.store import ModelStore, PullRequest
from tests.models.fakes import SAMPLES, Inspector, digest_of, files_below, pull
from tests.models.server import FileServer, file_server
from tests.models.splitting import split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.promise("S8")

ORIGINAL = SAMPLES / "tiny-chat.gguf"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return split(ORIGINAL, tmp_path / "parts", 3)


@pytest.fixture
async def server(parts: list[Path]) -> AsyncIterator[FileServer]:
    async with file_server(b"no file") as server:
        for query in ("", "?download=true"):
            server.files |= {f"/{path.name}{query}": path.read_bytes() for path in parts}
        yield server


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_pull_of_any_local_part_joins_the_whole_model(
    store: ModelStore, root: Path, parts: list[Path], number: int
) -> None:
    events = await pull(store, PullRequest(str(parts[number])))
    content = (root / "big.gguf").read_bytes()
    assert events[-1] == Success("big", len(content), f"sha256:{digest_of(content)}")
    assert any(isinstance(event, StepStarted) and event.text.startswith("joining 3 parts") for event in events)
    header = read_header(root / "big.gguf")
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in read_header(ORIGINAL).tensors]
    assert [model.name for model in await store.list() if not model.bundled] == ["big"]
    assert files_below(root) == {"big.gguf", "big.json"}
    assert (await pull(store, PullRequest(str(parts[0]))))[-1] == events[-1]
    await store.delete("big")
    assert files_below(root) == set()


async def test_pull_of_any_remote_part_joins_the_whole_model(
    store: ModelStore, root: Path, parts: list[Path], server: FileServer
) -> None:
    events = await pull(store, PullRequest("mine", source=server.url(f"/{parts[1].name}?download=true")))
    content = (root / "mine.gguf").read_bytes()
    assert events[-1] == Success("mine", len(content), f"sha256:{digest_of(content)}")
    assert {request.path for request in server.requests} == {f"/{path.name}?download=true" for path in parts}
    local = ModelStore(root.parent / "other", inspect=Inspector())
    assert (await pull(local, PullRequest(str(parts[0]))))[-1] == Success("big", len(content), events[-1].digest)
    assert files_below(root) == {"mine.gguf", "mine.json"}


async def test_missing_local_parts_fail_before_the_copy(store: ModelStore, root: Path, parts: list[Path]) -> None:
    parts[1].unlink()
    with pytest.raises(ModelNotFoundError, match=r"its folder lacks big-00002-of-00003\.gguf\."):
        await pull(store, PullRequest(str(parts[0])))
    assert files_below(root) == set()


async def test_missing_remote_part_fails_before_the_download(
    store: ModelStore, root: Path, parts: list[Path], server: FileServer
) -> None:
    server.files[f"/{parts[2].name}"] = None
    with pytest.raises(ModelNotFoundError, match=r"part 3 of 3 .* missing .*big-00003-of-00003\.gguf"):
        await pull(store, PullRequest(server.url(f"/{parts[0].name}")))
    assert files_below(root) == set()


async def test_parts_of_different_models_are_rejected(store: ModelStore, root: Path, parts: list[Path]) -> None:
    parts[2].write_bytes(ORIGINAL.read_bytes())
    with pytest.raises(PullError, match="part 1 of 1, not 3 of 3"):
        await pull(store, PullRequest(str(parts[0])))
    assert files_below(root) == set()


async def test_digest_of_a_model_in_parts_is_rejected(store: ModelStore, parts: list[Path]) -> None:
    with pytest.raises(InvalidRequestError, match="a digest for each"):
        await pull(store, PullRequest(str(parts[0]), sha256="0" * 64))


async def test_complete_part_is_not_fetched_again(store: ModelStore, parts: list[Path], server: FileServer) -> None:
    broken = parts[2].read_bytes()[:100]
    server.files = {}
    contents = {f"/{path.name}": path.read_bytes() for path in parts} | {f"/{parts[2].name}": broken}
    fetched = []

    def content(request: object) -> tuple[bytes, str]:
        fetched.append(request.path)  # type: ignore[attr-defined]
        data = contents[fetched[-1]]
        return data, f'"{digest_of(data)}"'

    server.content = content  # type: ignore[method-assign]
    with pytest.raises(PullError, match=r"00003-of-00003\.gguf"):
        await pull(store, PullRequest(server.url(f"/{parts[0].name}")))
    contents[f"/{parts[2].name}"] = parts[2].read_bytes()
    assert isinstance((await pull(store, PullRequest(server.url(f"/{parts[0].name}"))))[-1], Success)


async def test_delete_removes_the_parts_of_an_interrupted_pull(
    store: ModelStore, root: Path, parts: list[Path]
) -> None:
    left = root / ".partial" / "big.files" / "big" / parts[0].name
    left.parent.mkdir(parents=True)
    left.write_bytes(b"part")
    await store.delete("big")
    assert files_below(root) == set()
