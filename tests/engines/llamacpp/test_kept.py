"""An installed llama.cpp that is damaged, or shares its data directory with other plugins and engines."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.openvino.options import OpenVinoOptions
from engine_plugin.engines.openvino.software import OpenVinoSoftware
from engine_plugin.errors import EnginePluginError, PreconditionError, UnavailableError
from engine_plugin.install import software as shared_module

from .mirror import Mirror, mirror, software, upgradable, versions
from .running import HELLO

if TYPE_CHECKING:
    from .conftest import Serve
    from .running import RunningPlugin

__all__ = ["mirror"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")


async def installed(serve: Serve, mirror: Mirror) -> RunningPlugin:
    """A plugin that has installed version b2000 and not started it."""
    mirror.publish("b2000")
    running = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    await running.client.install_engine()
    return running


def lose_power(running: RunningPlugin) -> None:
    """Empty each installed file, as a power cut leaves a file that was never synced."""
    files = [path for path in (software(running) / "versions").rglob("*") if path.is_file() and not path.is_symlink()]
    for path in files:
        if path.name != ".installed.json":
            path.write_bytes(b"")


@pytest.mark.promise("U1")
async def test_damaged_installation_is_detected_and_repaired(serve: Serve, mirror: Mirror) -> None:
    running = await installed(serve, mirror)
    for repair in (running.client.install_engine, running.client.upgrade_engine):
        lose_power(running)
        check = await running.client.check_engine()
        assert not check
        assert re.search(
            r"cannot run: .*/versions/.* has 0 of \d+ bytes \(\d of \d files are damaged\)", check.detail
        )
        with pytest.raises(PreconditionError, match=r"files are damaged\)\. Call InstallEngine"):
            await running.client.start_engine()
        assert "version b2000" in await repair()
        assert await running.client.check_engine()
    await running.client.start_engine()
    assert (await running.client.invoke("chat", HELLO))["choices"]


@pytest.mark.promise("U1")
async def test_program_that_the_system_does_not_run_is_reported_with_the_remedy(serve: Serve, mirror: Mirror) -> None:
    running = await installed(serve, mirror)
    [program] = (software(running) / "versions").rglob("llama-server")
    program.write_bytes(b"\0" * program.stat().st_size)
    with pytest.raises(
        EnginePluginError, match=r"Exec format error\. If the installation is damaged, call InstallEngine with cover"
    ):
        await running.client.start_engine()
    await running.client.install_engine(cover=True)
    await running.client.start_engine()


@pytest.mark.promise("U1")
async def test_installed_program_that_is_not_executable_is_repaired(serve: Serve, mirror: Mirror) -> None:
    running = await installed(serve, mirror)
    [program] = (software(running) / "versions").rglob("llama-server")
    program.chmod(0o600)
    assert not await running.client.check_engine()
    await running.client.install_engine()
    await running.client.start_engine()


@pytest.mark.promise("U6")
@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
async def test_installation_waits_for_a_locked_version(
    serve: Serve, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(shared_module, "_ACQUIRE_ATTEMPTS", 2)
    running = await installed(serve, mirror)
    [folder] = (software(running) / "versions").iterdir()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="is locked by another program; call StartEngine again later"):
            await running.client.start_engine()
    finally:
        os.close(descriptor)
    await running.client.start_engine()


@pytest.mark.promise("U6", "U7")
async def test_replaced_version_serves_until_its_plugin_stops(serve: Serve, mirror: Mirror) -> None:
    newer = await upgradable(serve, mirror)
    older = await serve(data=newer.engine.data, backend="release", version="b2000", mirror=mirror.url)
    assert "version b2001" in await newer.client.upgrade_engine()
    assert versions(newer) == ["release-b2000", "release-b2001"]
    assert await older.client.get_version() == "b2000"
    await older.client.load_model("tiny-random")
    assert (await older.client.invoke("chat", HELLO))["choices"]
    await older.client.stop_engine()
    (left := software(older) / "downloads").mkdir()
    (left / "old.part").touch()
    os.utime(left / "old.part", (0, 0))
    await older.client.start_engine()
    assert await older.client.get_version() == "b2001"
    assert versions(newer) == ["release-b2001"]
    assert not left.exists()


@pytest.mark.promise("U6")
async def test_software_deleted_while_it_runs_is_reported(serve: Serve, mirror: Mirror) -> None:
    running = await installed(serve, mirror)
    await running.client.start_engine()
    shutil.rmtree(software(running) / "versions")
    words = "was deleted: call StopEngine, InstallEngine and StartEngine"
    assert words in await running.client.health_check()
    with pytest.raises(UnavailableError, match=words):
        await running.client.load_model("tiny-random")
    await running.client.stop_engine()
    await running.client.install_engine()
    await running.client.start_engine()
    await running.client.load_model("tiny-random")


@pytest.mark.promise("U5")
async def test_installation_is_not_used_by_other_engines(serve: Serve, mirror: Mirror) -> None:
    running = await installed(serve, mirror)
    other = OpenVinoSoftware(OpenVinoOptions(backend="release"), running.engine.data, {"PATH": "/nothing"})
    assert not other.check().installed
    assert other.check().detail == "OpenVINO is not installed"
