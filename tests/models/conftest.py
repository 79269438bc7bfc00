"""A store in a temporary folder, an `inspect` that knows GGUF's first bytes only, a scripted server, and a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.models.store import FetchPolicy, ModelStore, bundled_samples
from tests.models.fakes import SAMPLES, Inspector
from tests.models.folderworld import FolderWorld, folder_world
from tests.models.server import file_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.models.server import FileServer

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def policy() -> FetchPolicy:
    return FetchPolicy(connect_s=5, stall_s=5, attempts=3, backoff_s=0.01, longest_wait_s=2)


@pytest.fixture
def inspector() -> Inspector:
    return Inspector()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "models"


@pytest.fixture
async def store(root: Path, inspector: Inspector, policy: FetchPolicy) -> AsyncIterator[ModelStore]:
    store = ModelStore(root, inspect=inspector, samples=bundled_samples(), policy=policy)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def world(root: Path) -> AsyncIterator[FolderWorld]:
    async with folder_world(root) as world:
        yield world


@pytest.fixture
def data() -> bytes:
    return (SAMPLES / "tiny-chat.gguf").read_bytes()


@pytest.fixture
async def server(data: bytes) -> AsyncIterator[FileServer]:
    async with file_server(data) as server:
        yield server
