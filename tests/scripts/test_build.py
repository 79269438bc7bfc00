"""Plugin directories: the start of the launcher, and atomic builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from typing import TYPE_CHECKING

import pytest
import yaml

import build
from engine_plugin.manifest import load_manifest, platform_key
from engine_plugin.protocol.handshake import COOKIE
from pins import ROOT
from tests.patience import LIMIT, pace

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = ROOT / "plugins/llamacpp/plugin.yaml"
MINOR = "{}.{}".format(*sys.version_info[:2])
TELL = """\
import json, os, sys
told = {"pid": os.getpid(), "python": sys.executable, "arguments": sys.argv, "isolated": sys.flags.isolated}
print(json.dumps(told))
"""

posix = pytest.mark.skipif(sys.platform == "win32", reason="the launcher of Windows is a program")


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    return tmp_path / "plugins dir's"


@pytest.fixture
def linked(plugins: Path) -> Path:
    return build.build_linked(MANIFEST, plugins)


@pytest.fixture
def telling(linked: Path) -> Path:
    """The launcher of a linked plugin that prints how it was started."""
    (linked / build.START).write_text(TELL, encoding="utf-8")
    return executable(linked)


def executable(plugin: Path) -> Path:
    return load_manifest(plugin / "plugin.yaml").executable()


def launch(command: Path | str, *arguments: str, cwd: Path | None = None, **environ: str) -> dict[str, object]:
    """Start a launcher; asserts that no process stood between it and Python."""
    env = {**os.environ, "CDPATH": "/", "PYTHONPATH": "/nowhere", **environ}
    with subprocess.Popen([command, *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE) as process:
        output, _ = process.communicate(timeout=LIMIT)
        told: dict[str, object] = json.loads(output)
    assert process.returncode == 0
    assert told["pid"] == process.pid
    assert told["isolated"] == 1
    return told


def refusal(command: Path, **environ: str) -> str:
    """Return the stderr of a launcher that cannot start Python."""
    done = subprocess.run([command], env={**os.environ, **environ}, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr


def not_linked(plugin: Path, interpreter: str) -> Path:
    """Rewrite a plugin's launcher as if a certain interpreter had built it."""
    path = executable(plugin)
    lines = path.read_text(encoding="utf-8").splitlines()
    text = [f"built_with={interpreter}" if line.startswith("built_with=") else line for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


@pytest.mark.promise("F6")
@posix
def test_launcher_becomes_python(telling: Path) -> None:
    told = launch(telling, "--flag", "two words", "", "*")
    arguments = told["arguments"]
    assert isinstance(arguments, list)
    assert arguments[1:] == ["--flag", "two words", "", "*"]
    assert told["python"] == sys.executable


@posix
def test_launcher_works_with_a_relative_path(telling: Path) -> None:
    launch(f"./{telling.name}", cwd=telling.parent)
    launch(f"{telling.parent.name}/{telling.name}", cwd=telling.parent.parent)


@posix
def test_launcher_works_through_symlinks(telling: Path, tmp_path: Path) -> None:
    absolute = tmp_path / "absolute"
    absolute.symlink_to(telling)
    folder = tmp_path / "a folder"
    folder.mkdir()
    relative = folder / "relative"
    relative.symlink_to("../absolute")
    launch(absolute)
    launch(relative)
    launch("./relative", cwd=folder)


@posix
def test_interpreter_of_the_environment_variable_is_used(telling: Path, tmp_path: Path) -> None:
    other = tmp_path / "my python"
    other.symlink_to(os.path.realpath(sys.executable))
    assert launch(telling, ENGINE_PLUGIN_PYTHON=str(other))["python"] == str(other)


@posix
def test_missing_interpreter_is_rejected(telling: Path) -> None:
    said = refusal(telling, ENGINE_PLUGIN_PYTHON="/no/python")
    assert said.startswith("[ERROR] llamacpp-plugin: ENGINE_PLUGIN_PYTHON is /no/python")


@posix
def test_path_is_searched_without_the_interpreter_of_the_build(linked: Path, telling: Path, tmp_path: Path) -> None:
    launcher = not_linked(linked, "/gone/python")
    (tmp_path / f"python{MINOR}").symlink_to(os.path.realpath(sys.executable))
    told = launch(launcher, PATH=f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert told["python"] == str(tmp_path / f"python{MINOR}")


@posix
def test_launcher_without_any_interpreter_reports_the_required_version(linked: Path, tmp_path: Path) -> None:
    said = refusal(not_linked(linked, "''"), PATH=str(tmp_path))
    assert f"needs Python {MINOR}, which is not on PATH" in said


def hosted(plugin: Path, short_dir: Path) -> tuple[str, str, int]:
    """Run a plugin that cannot load as a host does; returns its stdout, its stderr and its exit status."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PLUGIN_")}
    env |= {"AOG_PLUGIN": "aog-provider-plugin-v1", "PLUGIN_UNIX_SOCKET_DIR": str(short_dir)}
    env |= {"ENGINE_PLUGIN_GRPC": "native"}
    done = subprocess.run([executable(plugin)], env=env, capture_output=True, text=True, timeout=LIMIT)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.promise("G11", "G35")
@posix
def test_plugin_with_its_manifest_as_built_is_announced_before_it_loads(linked: Path, short_dir: Path) -> None:
    """One whose manifest was changed is loaded first: here neither can be."""
    start = linked / build.START
    text = start.read_text(encoding="utf-8")
    start.write_text(text.replace("import main as serve", "import missing as serve"), encoding="utf-8")
    reason = "[ERROR] the plugin is incomplete: cannot import name 'missing' from 'engine_plugin.app'"
    line, said, status = hosted(linked, short_dir)
    assert line.startswith(f"1|1|unix|{short_dir}/engine-plugin-")
    assert (said.startswith(reason), status) == (True, 1)
    assert list(short_dir.iterdir()) == []
    with (linked / "plugin.yaml").open("a", encoding="utf-8") as manifest:
        manifest.write("# changed\n")
    line, said, status = hosted(linked, short_dir)
    assert (line, said.startswith(reason), status) == ("", True, 1)


@pytest.mark.promise("T1")
@posix
def test_manifest_of_another_directory_is_read_when_the_environment_names_it(linked: Path, tmp_path: Path) -> None:
    shape = yaml.safe_load((linked / "plugin.yaml").read_text(encoding="utf-8"))
    shape["engine"]["unknown"] = 1
    (tmp_path / "plugin.yaml").write_text(yaml.safe_dump(shape), encoding="utf-8")

    said = refusal(executable(linked), **{COOKIE.name: COOKIE.value}, ENGINE_PLUGIN_DIR=str(tmp_path))
    assert "engine.unknown" in said


@posix
def test_incomplete_directory_is_reported(linked: Path) -> None:
    shutil.rmtree(linked / "lib")
    assert "the plugin is incomplete" in refusal(executable(linked))


@posix
def test_other_python_version_than_that_of_the_build_is_rejected(linked: Path) -> None:
    start = linked / build.START
    start.write_text(start.read_text(encoding="utf-8").replace(f'"{MINOR}"', '"3.0"'), encoding="utf-8")
    assert "was built for Python 3.0, not" in refusal(executable(linked))


def test_linked_plugin_started_by_hand_explains_itself(linked: Path) -> None:
    done = subprocess.run([executable(linked)], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "This program is a plugin" in done.stderr


def test_every_manifest_of_the_repository_builds_a_plugin(plugins: Path) -> None:
    built = [build.build_linked(manifest, plugins) for manifest in build.manifests()]
    assert build.manifests()[0] == ROOT / "plugin.yaml"
    others = ["llamacpp-plugin", "ollama-plugin", "openai-plugin"]
    assert [path.name for path in built] == ["openvino-plugin", *others]
    assert sorted(path.name for path in plugins.iterdir()) == [*others, "openvino-plugin"]
    assert all(executable(path).name.removesuffix(".exe") == path.name for path in built)


def test_linked_build_takes_less_than_a_second(plugins: Path) -> None:
    began = time.monotonic()
    build.build_linked(MANIFEST, plugins)
    assert time.monotonic() - began < pace(1)


def test_plugin_directory_is_named_after_the_provider(linked: Path, plugins: Path) -> None:
    assert linked == plugins / load_manifest(MANIFEST).provider.name
    assert sorted(path.name for path in linked.iterdir()) == ["bin", "lib", "plugin.yaml"]
    assert [path.name for path in plugins.iterdir()] == [linked.name]
    if sys.platform != "win32":
        assert linked.stat().st_mode & 0o777 == 0o755


def test_build_replaces_an_existing_directory(linked: Path, plugins: Path) -> None:
    (linked / "old").touch()
    assert build.build_linked(MANIFEST, plugins) == linked
    assert not (linked / "old").exists()
    assert [path.name for path in plugins.iterdir()] == [linked.name]


def test_failed_build_keeps_the_existing_directory(linked: Path, plugins: Path, tmp_path: Path) -> None:
    (linked / "old").touch()
    text = MANIFEST.read_text(encoding="utf-8").replace(platform_key(), "plan9_mips")
    broken = tmp_path / "plugin.yaml"
    broken.write_text(text, encoding="utf-8")
    with pytest.raises(Exception, match=f"plan9_mips|no {platform_key()}"):
        build.build_linked(broken, plugins)
    assert (linked / "old").exists()
    assert [path.name for path in plugins.iterdir()] == [linked.name]


def test_failed_rename_restores_the_existing_directory(linked: Path, plugins: Path) -> None:
    scratch = plugins / ".building-test"
    scratch.mkdir()
    with pytest.raises(FileNotFoundError):
        build.switch(scratch / "missing", linked, scratch)
    assert (linked / "plugin.yaml").exists()


def test_windows_launcher_finds_the_start_file(tmp_path: Path) -> None:
    """The stub of the .exe runs on Windows only; Python runs what is inside it anywhere, with its own separators."""
    launcher = tmp_path / "bin" / "windows-amd64" / "plugin.exe"
    launcher.parent.mkdir(parents=True)
    start = tmp_path / build.START
    start.parent.mkdir()
    start.write_text(TELL, encoding="utf-8")
    build.write_windows_launcher(launcher, f"../../{build.START}", r"C:\Program Files\python.exe", "-I -X utf8")
    assert launcher.read_bytes()[:2] == b"MZ"
    assert b'#!"C:\\Program Files\\python.exe" -I -X utf8\r\n' in launcher.read_bytes()
    with zipfile.ZipFile(launcher) as archive:
        program = archive.read("__main__.py").decode()
    assert r"..\..\lib\start_plugin.py" in program
    inside = launcher.with_suffix(".py")
    inside.write_text(program.replace("\\", os.sep), encoding="utf-8")
    done = subprocess.run([sys.executable, inside], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert json.loads(done.stdout)["arguments"] == [str(start)]
