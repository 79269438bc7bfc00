"""llama.cpp's own releases: installation over HTTP, upgrade of a running engine, and rollback."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.engines.llamacpp import software as software_module
from engine_plugin.engines.llamacpp.options import LlamaCppOptions
from engine_plugin.engines.llamacpp.software import release_archives
from engine_plugin.engines.options import option_problems
from engine_plugin.errors import EnginePluginError, InstallError, PreconditionError
from engine_plugin.install import software as shared_module
from engine_plugin.install.releases import select_archives
from engine_plugin.install.software import find_unpacked_program
from engine_plugin.manifest import load_manifest
from tests.install.packing import Member, pack
from tests.models.server import Script

from .mirror import SHIM, Mirror, mirror, software, upgradable, versions
from .running import HELLO, REPOSITORY, eventually

if TYPE_CHECKING:
    from .conftest import Serve
    from .running import RunningPlugin

__all__ = ["mirror"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")

# One does not run, another one cannot load a certain model.
BROKEN = SHIM.replace("def main() -> NoReturn:\n", 'def main() -> NoReturn:\n    sys.exit("libgomp is missing")\n')
PICKY = SHIM.replace(
    "    import xllamacpp\n", '    if "random" in options.model:\n        sys.exit(1)\n    import xllamacpp\n'
)


def origin(running: RunningPlugin) -> str:
    backend = running.engine.backend
    assert backend is not None
    return backend.version


@pytest.mark.promise("F25")
async def test_installed_release_answers(serve: Serve, mirror: Mirror, caplog: pytest.LogCaptureFixture) -> None:
    data = mirror.publish("b2000")
    mirror.server.scripts.append(Script(drop_after=len(data) // 2))
    running = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    check = await running.client.check_engine()
    assert (bool(check), check.detail) == (False, "llama.cpp is not installed")
    with pytest.raises(PreconditionError, match=r"llama.cpp is not installed\. Call InstallEngine"):
        await running.client.start_engine()
    with caplog.at_level(logging.INFO, "engine_plugin.plugin"):
        said = await running.client.install_engine()
    assert said.startswith(f"llama-server in {software(running)}")
    assert said.endswith("version b2000")
    assert [path.name for path in software(running).iterdir() if path.is_dir()] == ["versions"]
    assert await running.client.get_version() == "b2000"
    steps = [record.message for record in caplog.records if getattr(record, "progress", "") == "InstallEngine"]
    assert f"unpacking {mirror.name('b2000')}" in steps
    assert any("trying again" in step for step in steps)
    last = [record for record in caplog.records if hasattr(record, "completed")][-1]
    assert (vars(last)["completed"], vars(last)["total"]) == (len(data), len(data))

    await running.client.start_engine()
    assert (await running.client.invoke("chat", HELLO))["choices"][0]["message"]["content"].startswith("Hello")
    command = psutil.Process(await running.engine_pid("tiny-chat-gguf")).cmdline()
    assert any(word.startswith(str(software(running) / "versions" / "release-b2000-")) for word in command)
    assert "version b2000" in await running.client.install_engine()
    assert "nothing to upgrade" in await running.client.upgrade_engine()
    assert len(mirror.fetched()) == 2
    elsewhere = mirror.server.url("/another")
    again = await serve(start=False, data=running.engine.data, backend="release", version="b2000", mirror=elsewhere)
    assert "nothing to upgrade" in await again.client.upgrade_engine(), "it is the same release from another place"


@pytest.mark.promise("F15")
async def test_start_never_waits_for_a_download(serve: Serve, mirror: Mirror) -> None:
    """It reports missing software at once, also during an installation, and downloads nothing."""
    mirror.publish("b2000")
    script = Script(stall_after=1000)
    mirror.server.scripts.append(script)
    running = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    with pytest.raises(PreconditionError, match=r"llama.cpp is not installed\. Call InstallEngine"):
        await running.client.start_engine()
    assert mirror.server.requests == []
    installing = asyncio.create_task(running.client.install_engine())
    await eventually(lambda: bool(mirror.fetched()))
    with pytest.raises(PreconditionError, match=r"llama.cpp is not installed\. Call InstallEngine"):
        await running.client.start_engine()
    script.go.set()
    await installing
    await running.client.start_engine()


async def test_cover_downloads_again(serve: Serve, mirror: Mirror) -> None:
    mirror.publish("b2000")
    running = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    for _ in range(2):
        await running.client.install_engine(cover=True)
    assert len(mirror.fetched()) == 2
    assert versions(running) == ["release-b2000"]


async def test_two_plugins_install_once(serve: Serve, mirror: Mirror) -> None:
    """The second waits for the lock of the first, and uses its installation."""
    mirror.publish("b2000")
    script = Script(stall_after=1000)
    mirror.server.scripts.append(script)
    first = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    second = await serve(start=False, data=first.engine.data, backend="release", version="b2000", mirror=mirror.url)
    installing = [asyncio.create_task(first.client.install_engine())]
    await eventually(lambda: bool(mirror.fetched()))
    installing += [asyncio.create_task(plugin.client.install_engine()) for plugin in (first, second, second)]
    await eventually(lambda: second.engine.installing.running)
    script.go.set()
    assert len(set(await asyncio.gather(*installing))) == 1
    assert len(mirror.fetched()) == 1


async def test_running_engine_is_upgraded_and_keeps_running(serve: Serve, mirror: Mirror) -> None:
    running = await upgradable(serve, mirror)
    await running.client.start_engine()
    await running.client.load_model("tiny-random")
    assert origin(running) == "b2000"
    old = psutil.Process(await running.engine_pid("tiny-random"))
    said = await running.client.upgrade_engine()
    assert said.startswith("upgraded: llama-server in ")
    assert said.endswith("version b2001")
    assert (origin(running), await running.client.get_version()) == ("b2001", "b2001")
    assert await running.loaded() == ["tiny-random"]
    assert not old.is_running()
    assert versions(running) == ["release-b2001"]
    assert (await running.client.invoke("chat", HELLO))["choices"]


@pytest.mark.promise("F19")
async def test_running_request_ends_before_the_engine_is_replaced(serve: Serve, mirror: Mirror) -> None:
    running = await upgradable(serve, mirror)
    await running.client.start_engine()
    async with running.client.stream("chat", HELLO | {"model": "tiny-random", "max_tokens": 400}) as chunks:
        first = await anext(chunks)
        upgrading = asyncio.create_task(running.client.upgrade_engine())
        rest = b"".join([chunk async for chunk in chunks])
    assert (first + rest).endswith(b"data: [DONE]\n\n")
    assert (await upgrading).endswith("version b2001")


async def test_stopped_engine_is_upgraded_and_stays_stopped(serve: Serve, mirror: Mirror) -> None:
    running = await upgradable(serve, mirror)
    assert (await running.client.upgrade_engine()).endswith("version b2001")
    assert running.engine.backend is None
    assert running.processes() == []
    with pytest.raises(EnginePluginError, match="the engine is not running"):
        await running.client.invoke("chat", HELLO)


async def test_version_that_does_not_run_does_not_affect_the_engine(serve: Serve, mirror: Mirror) -> None:
    running = await upgradable(serve, mirror, BROKEN)
    await running.client.start_engine()
    await running.client.load_model("tiny-chat-gguf")
    pid = await running.engine_pid("tiny-chat-gguf")
    with pytest.raises(EnginePluginError, match=r"was not changed: .*libgomp is missing") as caught:
        await running.client.upgrade_engine()
    assert caught.value.code == InstallError.code
    assert await running.engine_pid("tiny-chat-gguf") == pid
    assert versions(running) == ["release-b2000"]
    assert (await running.client.invoke("chat", HELLO))["choices"]


async def test_version_that_cannot_load_the_loaded_models_is_rolled_back(serve: Serve, mirror: Mirror) -> None:
    """It passes the trial with the sample model, but fails with the user's model."""
    running = await upgradable(serve, mirror, PICKY)
    await running.client.start_engine()
    await running.client.load_model("tiny-random")
    with pytest.raises(EnginePluginError, match="the new version failed; version b2000 is used again"):
        await running.client.upgrade_engine()
    assert (origin(running), await running.client.get_version()) == ("b2000", "b2000")
    assert await running.loaded() == ["tiny-random"]
    assert versions(running) == ["release-b2000"]
    assert (await running.client.invoke("chat", HELLO | {"model": "tiny-random", "max_tokens": 4}))["choices"]


async def test_engine_stopped_during_an_upgrade_stays_stopped(
    serve: Serve, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await upgradable(serve, mirror)
    await running.client.start_engine()
    await running.client.load_model("tiny-random")
    drain, draining, go_on = running.engine.pool.drain, asyncio.Event(), asyncio.Event()

    async def slow_drain() -> None:
        draining.set()
        await go_on.wait()
        await drain()

    monkeypatch.setattr(running.engine.pool, "drain", slow_drain)
    upgrading = asyncio.create_task(running.client.upgrade_engine())
    await draining.wait()
    await running.client.stop_engine()
    go_on.set()
    assert (await upgrading).endswith("version b2001")
    assert running.engine.backend is None
    assert running.processes() == []


async def test_damaged_archive_is_rejected(serve: Serve, mirror: Mirror) -> None:
    data = mirror.publish("b2000")
    mirror.server.data = data[:-20]
    running = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    with pytest.raises(EnginePluginError, match="expected sha256:"):
        await running.client.install_engine()
    mirror.server.data = b"\x1f\x8b" + data[2:-20]
    mirror.server.files["/mirror/b2000/SHA256SUMS"] = None
    with pytest.raises(EnginePluginError, match="there is no such file"):
        await running.client.install_engine()
    loose = await serve(start=False, backend="release", version="b2000", mirror=mirror.url, verify=False,
                        checksums=str(software(running) / "none"))  # fmt: skip
    with pytest.raises(EnginePluginError, match="the archive is damaged"):
        await loose.client.install_engine()
    assert not (software(loose) / "downloads").exists(), "an unverified download is not kept"
    mirror.server.data = data
    assert (await loose.client.install_engine()).endswith("version b2000")


async def test_local_archive_is_installed_offline(serve: Serve, scratch: Path, mirror: Mirror) -> None:
    data = mirror.publish("b2000")
    path = scratch / mirror.name("b2000")
    archive = {"url": str(path), "sha256": hashlib.sha256(data).hexdigest()}
    running = await serve(backend="auto", archives=[archive], offline=True, start=False)
    assert not await running.client.check_engine()
    assert (await running.client.install_engine()).endswith("version b2000")
    assert path.exists()
    assert mirror.server.requests == []
    await running.client.start_engine()
    assert (await running.client.invoke("chat", HELLO))["choices"]


async def test_archive_without_llama_server_is_rejected(serve: Serve, scratch: Path) -> None:
    data = pack(scratch / "a.zip", [Member("llama-cli", b"")]).read_bytes()
    archive = {"url": str(scratch / "a.zip"), "sha256": hashlib.sha256(data).hexdigest()}
    running = await serve(backend="release", archives=[archive], start=False)
    with pytest.raises(EnginePluginError, match="the archive contains no llama-server"):
        await running.client.install_engine()
    assert versions(running) == []


async def test_offline_installation_reports_where_to_put_the_archive(serve: Serve) -> None:
    running = await serve(backend="release", offline=True, start=False)
    tag = running.engine.software.wanted_version
    with pytest.raises(EnginePluginError) as caught:
        await running.client.install_engine()
    assert f"https://github.com/ggml-org/llama.cpp/releases/download/{tag}/llama-{tag}-bin-" in str(caught.value)
    assert str(software(running) / "offline") in str(caught.value)
    pip = await serve(backend="xllamacpp", offline=True, start=False)
    with pytest.raises(EnginePluginError, match=r"pip failed: .* Put the wheels into .*offline"):
        await pip.client.install_engine(cover=True)


async def test_missing_gguf_package_is_installed_too(
    serve: Serve, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the pinned requirements without xllamacpp. The release is complete without it."""
    asked: list[str] = []

    async def pip(target: Path, requirements: list[str], *_arguments: Any, **_options: Any) -> None:
        packages(target, Path(requirements[-1]))

    def packages(target: Path, requirements: Path) -> None:
        asked.append(requirements.read_text())
        (target / "gguf-9.dist-info").mkdir(parents=True)
        (target / "gguf-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: gguf\nVersion: 9\n")

    found = shared_module.distribution_version
    monkeypatch.setattr(shared_module, "install_packages", pip)
    monkeypatch.setattr(software_module, "distribution_version", lambda path, name: found(path, name) if path else "")
    mirror.publish("b2000")
    running = await serve(start=False, backend="release", version="b2000", mirror=mirror.url)
    assert (await running.client.install_engine()).endswith("version b2000")
    [requirements] = asked
    assert "gguf==" in requirements
    assert "--hash=sha256:" in requirements
    assert "xllamacpp" not in requirements
    await running.client.start_engine()
    assert (await running.client.invoke("chat", HELLO))["choices"]
    assert not list((software(running) / "versions").glob("*.txt"))


def test_archive_names_of_releases() -> None:
    """The names are those of llama.cpp's release workflow."""
    base = "https://github.com/ggml-org/llama.cpp/releases/download/b11549"
    archives = release_archives("b11549", "", "")
    assert {archive.checksums for archive in archives} == {
        "https://api.github.com/repos/ggml-org/llama.cpp/releases/tags/b11549"
    }
    for platform, accelerator, names in (
        ("linux_amd64", "cpu", ["llama-b11549-bin-ubuntu-x64.tar.gz"]),
        ("linux_arm64", "vulkan", ["llama-b11549-bin-ubuntu-vulkan-arm64.tar.gz"]),
        ("darwin_arm64", "auto", ["llama-b11549-bin-macos-arm64.tar.gz"]),
        ("darwin_amd64", "auto", ["llama-b11549-bin-macos-x64.tar.gz"]),
        ("windows_amd64", "auto", ["llama-b11549-bin-win-cpu-x64.zip"]),
        (
            "windows_amd64",
            "cuda",
            ["llama-b11549-bin-win-cuda-12.4-x64.zip", "cudart-llama-bin-win-cuda-12.4-x64.zip"],
        ),
    ):
        chosen = select_archives(archives, accelerator, platform)
        assert [archive.url for archive in chosen] == [f"{base}/{name}" for name in names]
    assert release_archives("b1", "https://m/x/", "")[0].url == "https://m/x/b1/llama-b1-bin-ubuntu-x64.tar.gz"
    assert release_archives("b1", "https://m/x/", "")[0].checksums == "https://m/x/b1/SHA256SUMS"
    assert release_archives("b1", "https://m/x/", "/sums")[0].checksums == "/sums"


def test_llama_server_nearest_to_the_root_is_used(tmp_path: Path) -> None:
    for place in ("tools/old/llama-server", "build/bin/llama-server"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch(0o644)
    (tmp_path / "llama-server").mkdir()
    server = find_unpacked_program(tmp_path, "llama-server")
    assert server == tmp_path / "build/bin/llama-server"
    assert server.stat().st_mode & 0o111


def test_invalid_archives_are_reported_with_their_lines(tmp_path: Path) -> None:
    text = (REPOSITORY / "plugins/llamacpp/plugin.yaml").read_text()
    lines = [
        "  backend: release",
        "  archives:",
        "    - url: ${PLUGIN_DIR}/llama.tar.gz",
        "      os: linux",
        "      sha256: abc",
        "    - os: macos",
        "      file: x",
        "    - llama.zip",
    ]
    (tmp_path / "plugin.yaml").write_text(text.rstrip() + "\n" + "\n".join(lines) + "\n")
    before = text.rstrip().count("\n") + 1
    problems = option_problems(LlamaCppOptions, load_manifest(tmp_path / "plugin.yaml"))
    assert [(problem.line - before, problem.what, problem.fix) for problem in problems] == [
        (5, "engine.archives[0].sha256 is 'abc'", "It must be 64 hex digits."),
        (6, "engine.archives[1].os is 'macos'", "It must be one of nothing, linux, darwin, windows."),
        (
            7,
            "engine.archives[1].file is not an option of this engine",
            "Known options: url, os, arch, accelerator, sha256, size, checksums.",
        ),
        (6, "engine.archives[1].url is missing", "Give it a text."),
        (8, "engine.archives[2] is 'llama.zip'", "It must be a mapping."),
    ]
