"""pip as a subprocess: progress in bytes, temporary files, settings and failures."""

from __future__ import annotations

import http.server
import importlib.metadata
import os
import threading
import zipfile
from functools import partial
from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import ChunkProgress
from engine_plugin.errors import InstallError
from engine_plugin.install.pip import install_packages
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 3 * 1024 * 1024
WHEEL = "heavy-1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a package index on loopback with one wheel of 3 MiB."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "heavy").mkdir()
    information = "heavy-1.0.dist-info"
    with zipfile.ZipFile(folder / "heavy" / WHEEL, "w") as wheel:
        wheel.writestr("heavy/data", os.urandom(SIZE))
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: heavy\nVersion: 1.0\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    (folder / "heavy" / "index.html").write_text(f'<!DOCTYPE html><a href="{WHEEL}">{WHEEL}</a>')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    serving.join()
    server.server_close()


def environ(index: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {**kept, "PIP_INDEX_URL": index, "PIP_NO_CACHE_DIR": "1", "PIP_CONFIG_FILE": os.devnull}


@pytest.mark.promise("L8")
def test_the_wheel_requires_pip() -> None:
    """An environment of pipx or uv has pip only if a package depends on it."""
    assert any(each.startswith("pip>=") for each in importlib.metadata.requires("engine-plugin") or ())


@pytest.mark.promise("T5")
@pytest.mark.promise("U4")
async def test_downloads_are_reported_in_bytes_and_temporary_files_are_in_scratch(index: str, tmp_path: Path) -> None:
    told: list[str | ChunkProgress] = []
    scratch, nowhere = tmp_path / "scratch", tmp_path / "nowhere"
    scratch.mkdir()
    env = environ(index) | {"TMPDIR": str(nowhere), "TEMP": str(nowhere), "TMP": str(nowhere)}
    await install_packages(tmp_path / "target", ["heavy==1.0"], env, told.append, scratch=scratch)
    assert (tmp_path / "target" / "heavy" / "data").stat().st_size == SIZE
    assert not nowhere.exists()
    chunks = [step for step in told if isinstance(step, ChunkProgress)]
    assert {chunk.digest for chunk in chunks} == {WHEEL}
    assert chunks[0].completed < chunks[-1].completed == chunks[-1].total > SIZE
    assert [step for step in told if isinstance(step, str)] == ["installing heavy"]


@pytest.mark.promise("U4")
async def test_full_disk_is_reported_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of pip on a full file system of 60 MB."""

    async def run(_argv: object, _env: object, tell: Callable[[str], None]) -> int:
        tell("Collecting heavy==1.0")
        tell("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
        tell("")
        return 1

    monkeypatch.setattr(python, "run_with_output", run)
    with pytest.raises(InstallError, match=r"target: No space left on device\. Free space there") as it:
        await install_packages(tmp_path / "target", ["heavy"], os.environ, print, scratch=tmp_path)
    assert "network" not in str(it.value)


HOSTILE = """\
[global]
quiet = 2
require-virtualenv = true
index-url = {index}
no-cache-dir = true
[install]
user = true
prefix = /nowhere
dry-run = true
constraint = /nowhere.txt
"""


@pytest.mark.promise("L5", "X2")
@pytest.mark.parametrize("by_file", [False, True], ids=["variables", "pip.conf"])
async def test_only_network_settings_of_pip_apply(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_file: bool
) -> None:
    """A pip.py in the working directory and Python variables of the environment are ignored too."""
    (tmp_path / "pip.py").write_text("raise SystemExit('pip.py of the working directory')\n")
    monkeypatch.chdir(tmp_path)
    env = environ(index) | {"PYTHONHOME": "/nowhere", "PYTHONSTARTUP": "/nowhere"}
    if by_file:
        settings = tmp_path / "pip.conf"
        settings.write_text(HOSTILE.format(index=index))
        env = {name: value for name, value in env.items() if not name.startswith("PIP_")}
        env["PIP_CONFIG_FILE"] = str(settings)
    else:
        env |= {"PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PIP_PREFIX": "/nowhere", "PIP_TARGET": "/nowhere"}
        env |= {"PIP_PYTHON": "/nowhere", "PIP_DRY_RUN": "1", "PIP_CONSTRAINT": "/nowhere"}
    await install_packages(tmp_path / "target", ["heavy==1.0"], env, lambda _step: None, scratch=tmp_path)
    assert (tmp_path / "target" / "heavy" / "data").is_file()


@pytest.mark.promise("L5")
async def test_invalid_pip_conf_is_reported(index: str, tmp_path: Path) -> None:
    settings = tmp_path / "pip.conf"
    settings.write_text("no section\n")
    env = environ(index) | {"PIP_CONFIG_FILE": str(settings)}
    with pytest.raises(InstallError, match=r"pip cannot read its settings: .*pip\.conf.* Correct the file"):
        await install_packages(tmp_path / "target", ["heavy"], env, lambda _step: None, scratch=tmp_path)
