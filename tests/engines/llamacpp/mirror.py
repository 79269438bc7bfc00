"""A mirror of llama.cpp's releases, and plugins that install from it."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio

from engine_plugin.engines.llamacpp.software import release_archives
from engine_plugin.install.releases import select_archives
from tests.install.packing import Member, pack
from tests.models.server import FileServer, file_server, without_proxies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

    from .conftest import Serve
    from .running import RunningPlugin

__all__ = ["SHIM", "Mirror", "mirror", "software", "upgradable", "versions"]

SHIM = Path(__file__).with_name("shim.py").read_text()


class Mirror:
    """A mirror with releases of llama.cpp for this machine."""

    def __init__(self, server: FileServer, root: Path) -> None:
        self.server = server
        self.url = server.url("/mirror")
        self._root = root

    def name(self, tag: str) -> str:
        [archive] = select_archives(release_archives(tag, self.url, ""), "auto")
        assert archive.url.startswith(f"{self.url}/{tag}/")
        return archive.url.rpartition("/")[2]

    def publish(self, tag: str, program: str = SHIM) -> bytes:
        program = f"#!{sys.executable}\n{program.replace('version: 1234', f'version: {tag[1:]}')}"
        members = [
            Member(f"llama-{tag}/"),
            Member(f"llama-{tag}/LICENSE", b"MIT"),
            Member(f"llama-{tag}/libllama.so", link="libllama.so.0"),
            Member(f"llama-{tag}/libllama.so.0", b"library" * 10_000),
            Member(f"llama-{tag}/llama-server", program.encode(), mode=0o755),
        ]
        data = pack(self._root / self.name(tag), members).read_bytes()
        self.server.files[f"/mirror/{tag}/SHA256SUMS"] = (
            f"{'0' * 64}  another.zip\n{hashlib.sha256(data).hexdigest()}  {self.name(tag)}\n".encode()
        )
        self.server.data = data
        return data

    def fetched(self) -> list[str]:
        """The requested archives."""
        paths = [request.path for request in self.server.requests]
        return [path.rpartition("/")[2] for path in paths if not path.endswith("SHA256SUMS")]


@pytest_asyncio.fixture
async def mirror(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mirror]:
    without_proxies(monkeypatch)
    async with file_server(b"") as server:
        yield Mirror(server, scratch)


def software(running: RunningPlugin) -> Path:
    return running.engine.software.folder


def versions(running: RunningPlugin) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (software(running) / "versions").iterdir())


async def upgradable(serve: Serve, mirror: Mirror, new: str = SHIM) -> RunningPlugin:
    """A plugin with b2000 installed, whose plugin.yaml sets b2001."""
    mirror.publish("b2000")
    first = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    await first.client.install_engine()
    mirror.publish("b2001", new)
    return await serve(start=False, data=first.engine.data, backend="release", version="b2001", mirror=mirror.url)
