"""InstallEngine and UpgradeEngine: tried before the switch, rolled back on failure, done once."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from engine_plugin.engines.llamacpp import software as software_module
from engine_plugin.engines.llamacpp.software import LlamaCppSoftware
from engine_plugin.errors import EnginePluginError, EngineStartError, InstallError, PreconditionError
from engine_plugin.install import software as shared_module
from engine_plugin.install import versions
from tests.patience import LIMIT, patience

from .running import HELLO, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .conftest import Serve
    from .running import RunningPlugin


def snapshot(folder: Path) -> set[str]:
    """The content of the software directory, without what each installation creates first."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return found - {"install.lock", "versions"}


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, fail: str = "", pause: asyncio.Event | None = None) -> list[Path]:
    """Replace pip: it writes a package of version 9.<number of the run>."""
    runs: list[Path] = []

    async def pip(target: Path, *_arguments: Any, **_options: Any) -> None:
        runs.append(target)
        for name in ("xllamacpp", "gguf"):
            information = target / f"{name}-9.{len(runs)}.dist-info"
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.{len(runs)}\n")
        if pause is not None:
            await pause.wait()
        if fail == "pip":
            raise InstallError("pip failed")

    async def probe(self: LlamaCppSoftware, _backend: Any) -> dict[str, Any]:
        if fail == "probe":
            raise EngineStartError("the new xllamacpp does not run (exit code 127): no libgomp")
        return {"version": f"9.{len(runs)}", "devices": []}

    monkeypatch.setattr(shared_module, "install_packages", pip)
    monkeypatch.setattr(LlamaCppSoftware, "probe", probe)
    return runs


async def test_existing_software_is_not_installed_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_pip(monkeypatch)
    running = await serve(start=False)
    assert "xllamacpp beside engine-plugin" in await running.client.install_engine()
    assert "nothing to upgrade" in await running.client.upgrade_engine()
    assert runs == []
    assert not running.engine.software.folder.exists()


async def test_cover_installs_and_replaces(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in one process: the first must have released its lock."""
    fake_pip(monkeypatch)
    running = await serve(start=False)
    folder = running.engine.software.folder
    async with asyncio.timeout(LIMIT):
        assert "version 9.1" in await running.client.install_engine(cover=True)
        assert "version 9.2" in await running.client.install_engine(cover=True)
    current = json.loads((folder / "current-llamacpp.json").read_text())["folder"]
    assert current.startswith("xllamacpp-9.2-")
    assert [path.name for path in (folder / "versions").iterdir()] == [current]
    assert (await running.client.check_engine()).detail.startswith(f"xllamacpp in {folder / 'versions' / current}")
    assert await running.client.get_version() == "9.2"


@pytest.mark.promise("P13")
@pytest.mark.parametrize("fail", ["pip", "probe"])
async def test_failed_installation_changes_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch, fail: str) -> None:
    fake_pip(monkeypatch)
    running = await serve(start=False)
    await running.client.install_engine(cover=True)
    before = snapshot(running.engine.software.folder)
    fake_pip(monkeypatch, fail=fail)
    with pytest.raises(EnginePluginError, match=r"pip failed|installation was not changed: .* no libgomp") as it:
        await running.client.install_engine(cover=True)
    assert it.value.code == 500
    assert snapshot(running.engine.software.folder) == before
    assert await running.client.get_version() == "9.1"


@pytest.mark.promise("P14")
async def test_concurrent_installations_share_one(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Event()
    runs = fake_pip(monkeypatch, pause=gate)
    running = await serve(start=False)
    joined, join = [], running.engine.installing.run

    async def joining(work: Callable[[], Coroutine[Any, Any, str]]) -> str:
        joined.append(work)
        return await join(work)

    monkeypatch.setattr(running.engine.installing, "run", joining)
    calls = [asyncio.create_task(running.client.install_engine(cover=True)) for _ in range(5)]
    await eventually(lambda: len(runs) == 1 and len(joined) == 5)
    abandoned = calls.pop()
    abandoned.cancel()
    gate.set()
    answers = await asyncio.gather(*calls)
    assert len(set(answers)) == 1
    assert len(runs) == 1


@pytest.mark.promise("P14")
async def test_installation_waits_for_that_of_another_process(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_pip(monkeypatch)
    running = await serve(start=False)
    folder = running.engine.software.folder
    folder.mkdir(parents=True)
    with FileLock(folder / "install.lock"):
        installing = asyncio.create_task(running.client.install_engine(cover=True))
        await eventually(lambda: running.engine.installing.running)
        await running.client.check_engine()
        assert runs == []
    await installing
    assert len(runs) == 1
    monkeypatch.setattr(versions, "LOCK_TIMEOUT", 0.2)
    with FileLock(folder / "install.lock"), pytest.raises(EnginePluginError, match="another installation has held"):
        await running.client.install_engine(cover=True)


async def test_full_disk_is_reported_before_the_download(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_pip(monkeypatch)
    running = await serve(start=False)
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    with pytest.raises(EnginePluginError, match=r"has 1 MiB free .* xllamacpp needs 400 MiB more"):
        await running.client.install_engine(cover=True)
    assert runs == []


async def test_running_engine_changes_to_the_installed_version(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old version's files are removed, so that a load from there would fail."""
    running = await serve()
    await running.client.load_model("tiny-chat-gguf")
    fake_pip(monkeypatch)
    await running.client.install_engine(cover=True)
    assert await running.loaded() == ["tiny-chat-gguf"]
    assert running.engine.backend is not None
    assert running.engine.backend.version == "9.1"
    # The fake package contains no module, so the one beside the plugin answers.
    assert (await running.client.invoke("chat", HELLO))["choices"]


async def test_missing_software_is_reported(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software_module, "distribution_version", lambda _path, _name: "")
    running = await serve(start=False)
    check = await running.client.check_engine()
    assert (bool(check), check.detail) == (False, "llama.cpp is not installed")
    for attempt in (running.client.start_engine(), running.client.get_version(), running.client.pull_model("a.gguf")):
        with pytest.raises(EnginePluginError, match=r"InstallEngine|a\.gguf"):
            await attempt
    with pytest.raises(PreconditionError, match=r"llama.cpp is not installed\. Call InstallEngine"):
        await running.client.start_engine()


async def pip_refuses(running: RunningPlugin) -> None:
    before = snapshot(running.engine.software.folder)
    with pytest.raises(EnginePluginError, match=r"pip failed: .*0\.0\.0-nope.*Check the network"):
        await running.client.install_engine(cover=True)
    assert snapshot(running.engine.software.folder) == before


async def test_error_of_pip_is_reported(serve: Serve) -> None:
    running = await serve(start=False, version="0.0.0-nope")
    running.engine.software.folder.mkdir(parents=True)
    await pip_refuses(running)
    assert await running.client.check_engine()


@pytest.mark.slow
async def test_real_installation_answers(serve: Serve, scratch: Path) -> None:
    """With pip, from the registry, by hash; then chat uses only this installation."""
    running = await serve(start=False)
    said = await running.client.install_engine(cover=True, timeout=patience(60))
    folder = running.engine.software.folder
    assert f"xllamacpp in {folder}" in said
    assert await running.client.get_version() == running.engine.software.wanted_version
    before = snapshot(folder)
    assert "nothing to upgrade" in await running.client.upgrade_engine()
    assert snapshot(folder) == before
    await running.client.start_engine()
    assert (await running.client.invoke("chat", HELLO))["choices"]
    [process] = running.servers()
    if sys.platform == "linux":
        assert str(folder) in "".join(mapped.path for mapped in process.memory_maps())
    again = await serve(start=False, data=running.engine.data, version="0.0.0-nope")
    await pip_refuses(again)
    assert (await running.client.invoke("chat", HELLO))["choices"]
