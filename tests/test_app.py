"""The program that a host spawns: its imports before the handshake, and its errors for an unusable plugin.yaml."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import psutil
import pytest

from build import build_linked
from engine_plugin.app import build
from engine_plugin.engines.base import engine_class
from engine_plugin.errors import ManifestError, UnsupportedError
from engine_plugin.host import launch
from engine_plugin.manifest import load_manifest
from engine_plugin.rpc.choice import use_grpcio
from engine_plugin.server import new_server
from tests.patience import LIMIT
from tests.shipped import shipped, write_manifest

from .host.conftest import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

HEAVY = (
    "httpx",
    "rich",
    "click",
    "numpy",
    "openvino",
    "openvino_genai",
    "xllamacpp",
    "gguf",
    "filelock",
    "platformdirs",
    "grpc",
    "grpc_health",
    "grpc_reflection",
    "ssl",
    "psutil",
    "hashlib",
    "uuid",
    "importlib.metadata",
    "email",
    "zipfile",
    "google.protobuf.text_format",
    "engine_plugin.install.software",
    "engine_plugin.models.store",
    "engine_plugin.process.engine_process",
    "engine_plugin.speech.services",
)

# Runs a plugin up to the point where it would serve; deferred modules have a type of their own.
SHOW_MODULES = """\
import sys
from engine_plugin.system.deferred import UNUSED, defer
defer(*UNUSED)
import json, types
from engine_plugin import app
def show(load, _cookie, _early):
    import asyncio
    from engine_plugin.goplugin import session
    from engine_plugin.server import new_server
    built = asyncio.run(load())
    server = new_server()
    for service in built.services:
        server.add(service)
    print(json.dumps([name for name, module in sys.modules.items() if type(module) is types.ModuleType]))
app.serve.run = show
app.main(sys.argv[1])
"""


@pytest.mark.skipif(use_grpcio(), reason="grpcio is heavy")
def test_no_heavy_module_is_imported_by_a_start(tmp_path: Path) -> None:
    """An attached engine needs neither what installs nor what runs one. A start takes as long as its imports."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_MODULES, str(REPOSITORY / "plugins" / "ollama")],
        env=os.environ | {"AOG_DATA_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stdout))
    assert "engine_plugin.engines.ollama.engine" in modules
    assert modules & set(HEAVY) == set()
    assert list(tmp_path.iterdir()) == []


async def test_built_plugin_serves_every_rpc(tmp_path: Path) -> None:
    built = build(load_manifest(REPOSITORY / "plugin.yaml", {"AOG_DATA_DIR": str(tmp_path)}))
    [service] = built.services
    assert service.descriptor.full_name == "protocol.ProviderService"
    new_server().add(service)  # raises AttributeError for an rpc without a method
    await built.aclose()


def test_building_a_plugin_object_writes_no_files(tmp_path: Path) -> None:
    build(load_manifest(REPOSITORY / "plugin.yaml", {"AOG_DATA_DIR": str(tmp_path)}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux" or use_grpcio(), reason="reads /proc; grpcio's threads wake on their own")
async def test_idle_plugin_has_one_thread_that_is_not_woken(tmp_path: Path, short_dir: Path) -> None:
    plugin = build_linked(REPOSITORY / "plugins" / "ollama" / "plugin.yaml", tmp_path)
    variables = {"AOG_DATA_DIR": str(tmp_path / "data"), "PLUGIN_UNIX_SOCKET_DIR": str(short_dir)}
    command = [str(load_manifest(plugin / "plugin.yaml").executable())]
    async with await launch(command, env=variables, start_timeout=LIMIT) as client:
        await client.get_operate_status()
        assert client.pid is not None
        process = psutil.Process(client.pid)
        assert process.num_threads() == 1
        await asyncio.sleep(1)  # what the call began is over by then
        before = process.num_ctx_switches().voluntary
        await asyncio.sleep(5)
        assert process.num_ctx_switches().voluntary == before


def changed(tmp_path: Path, **engine: object) -> Path:
    shape = shipped("openvino")
    shape["engine"] = engine
    shape["resources"]["data_dir"] = str(tmp_path / "data")
    return write_manifest(tmp_path, shape)


@pytest.mark.parametrize("name", ["llamacpp", "ollama", "openai", "openvino"])
def test_engine_of_this_package_is_the_one_of_its_entry_point(name: str) -> None:
    [declared] = {point.value for point in entry_points(group="engine_plugin.engines") if point.name == name}
    module, _, attribute = declared.partition(":")
    found = engine_class(name)
    assert (found.__module__, found.__name__) == (module, attribute)


@pytest.mark.parametrize("name", ["local", "base", "options", "ollama.engine", "../ollama", ""])
def test_name_of_another_module_is_no_engine(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no engine is called"):
        engine_class(name)


def test_unknown_engine_is_reported(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^engine.name: no engine is called 'nope'; installed engines: .*llamacpp"
    ):
        build(load_manifest(changed(tmp_path, name="nope")))


def test_invalid_option_is_reported_with_its_line(tmp_path: Path) -> None:
    path = changed(tmp_path, name="llamacpp", paralel=2)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "paralel" in text)
    with pytest.raises(ManifestError, match=rf"plugin.yaml:{line}: error: engine.paralel .*Did you mean 'parallel'"):
        build(load_manifest(path))


def hosted(place: Path, *, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the plugin by a program in `place`, there unless `cwd` is given, to its end."""
    place.mkdir(exist_ok=True)
    program = place / "program.py"
    program.write_text("import sys\nfrom engine_plugin.app import main\nsys.exit(main())\n")
    cookie = {"AOG_PLUGIN": "aog-provider-plugin-v1", "PLUGIN_PROTOCOL_VERSIONS": "1"}
    return subprocess.run(
        [sys.executable, str(program)],
        cwd=cwd or place,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | cookie | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_missing_manifest_error_lists_the_searched_directories(tmp_path: Path) -> None:
    done = hosted(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no plugin.yaml or plugin.json found in or above" in done.stderr
    assert str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_invalid_manifest_is_reported_with_its_line(tmp_path: Path) -> None:
    changed(tmp_path, name="llamacpp", parallel="many")
    (tmp_path / "bin").mkdir()
    done = hosted(tmp_path / "bin")
    assert (done.returncode, done.stdout) == (1, "")
    assert "engine.parallel is 'many'. It must be a whole number" in done.stderr
    assert "Traceback" not in done.stderr


def test_start_by_hand_explains_the_program(tmp_path: Path) -> None:
    done = hosted(tmp_path, AOG_PLUGIN="")
    assert (done.returncode, done.stdout) == (1, "")
    assert "plugin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.promise("T1")
def test_manifest_of_the_program_is_preferred_to_that_of_the_working_directory(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for place, wrong in ((own, "own"), (other, "other")):
        place.mkdir()
        changed(place, name="llamacpp", parallel=wrong)
    assert "engine.parallel is 'own'" in hosted(own / "bin", cwd=other).stderr
    assert "engine.parallel is 'other'" in hosted(own, ENGINE_PLUGIN_DIR=str(other)).stderr
    assert "engine.parallel is 'own'" in hosted(own, cwd=other, ENGINE_PLUGIN_DIR="llamacpp").stderr
    (own / "plugin.yaml").unlink()
    assert "engine.parallel is 'other'" in hosted(own, cwd=other).stderr


@pytest.mark.promise("T1")
def test_plugin_yaml_of_another_program_is_skipped(tmp_path: Path) -> None:
    changed(tmp_path, name="llamacpp", parallel="mine")
    inner = tmp_path / "chart"
    inner.mkdir()
    (inner / "plugin.yaml").write_text("name: helm-diff\nversion: 3.9\nusage: helm diff\n")
    done = hosted(tmp_path / "bin", cwd=inner)
    assert "engine.parallel is 'mine'" in done.stderr
    (tmp_path / "plugin.yaml").unlink()
    done = hosted(tmp_path / "bin", cwd=inner)
    assert f"{inner / 'plugin.yaml'} is ignored, because it is not a plugin manifest" in done.stderr


@pytest.mark.promise("X1")
@pytest.mark.skipif(sys.platform == "win32", reason="the permissions of Windows are not looked at")
def test_manifest_that_another_user_could_change_is_not_served(tmp_path: Path) -> None:
    path = changed(tmp_path, name="llamacpp", parallel="evil")
    path.chmod(0o666)
    beside = hosted(tmp_path)
    assert beside.returncode == 1
    assert f"{path} can be written by every user" in beside.stderr
    assert f"Run: chmod o-w {path}" in beside.stderr
    assert "evil" not in beside.stderr
    with pytest.raises(ManifestError, match="the file is not used, because another user could change it"):
        load_manifest(path)
