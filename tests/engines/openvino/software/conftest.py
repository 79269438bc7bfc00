"""A Software on a directory of its own, and a mirror of releases of the stand-in for ovms."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from engine_plugin.engines.openvino.options import OpenVinoOptions
from engine_plugin.engines.openvino.software import OpenVinoSoftware
from engine_plugin.install import software as shared_module
from engine_plugin.install.software import Backend, InstallHooks
from tests.engines.openvino.fake_ovms.archives import Mirror
from tests.leftovers import marked, nothing_is_left, scratch
from tests.models.server import file_server, without_proxies

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["Place", "marked", "nothing_is_left", "scratch"]


@dataclass
class Place:
    """What a driver does with Software, and what it was told."""

    root: Path
    told: list[str] = field(default_factory=list)
    tried: list[Backend] = field(default_factory=list)
    adopted: int = 0
    fails: Exception | None = None
    """What adopting raises, once."""

    def software(self, environ: dict[str, str] | None = None, **options: Any) -> OpenVinoSoftware:
        """No ovms is on its PATH but what `environ` puts there."""
        env = {**os.environ, "PATH": str(self.root / "nothing"), **(environ or {})}
        return OpenVinoSoftware(OpenVinoOptions(**options), self.root / "data", env)

    def tell(self, step: Any) -> None:
        self.told.append(step if isinstance(step, str) else "")

    async def _trial(self, backend: Backend) -> None:
        self.tried.append(backend)

    async def _adopt(self) -> None:
        self.adopted += 1
        fails, self.fails = self.fails, None
        if fails is not None:
            raise fails

    async def install(self, software: OpenVinoSoftware, *, cover: bool = False) -> str:
        return await software.install(self.tell, InstallHooks(self._trial, self._adopt), cover=cover)

    async def upgrade(self, software: OpenVinoSoftware) -> bool:
        return await software.upgrade(self.tell, InstallHooks(self._trial, self._adopt))

    def versions(self) -> list[str]:
        folder = self.root / "data" / "software" / "versions"
        return sorted(path.name.rpartition("-")[0] for path in folder.iterdir())

    def left(self) -> set[str]:
        """What lies in the software's directory besides the versions."""
        return {path.name for path in (self.root / "data" / "software").iterdir()}


@pytest.fixture
def place(scratch: Path) -> Place:
    return Place(scratch)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let pip be done in no time. What it was asked for: the file of requirements."""
    asked: list[str] = []

    async def install(target: Path, arguments: list[str], *_more: Any, **_named: Any) -> None:
        lines = (target.parent.parent.parent / arguments[-1]).read_text()
        asked.append(lines)
        for name in ("av", "numpy", "soxr", "jinja2", "markupsafe", "openvino-genai"):
            if f"{name}==" not in lines:
                continue
            version = lines.partition(f"{name}==")[2].split()[0]
            information = target / f"{name.replace('-', '_')}-{version}.dist-info"
            information.mkdir(parents=True)
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    monkeypatch.setattr(shared_module, "install_packages", install)
    return asked


@pytest_asyncio.fixture
async def mirror(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mirror]:
    without_proxies(monkeypatch)
    async with file_server(b"") as server:
        yield Mirror(server, scratch)
