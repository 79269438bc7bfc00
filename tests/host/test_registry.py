"""Plugins are discovered as AOG discovers them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
import yaml

from engine_plugin.errors import ManifestError, NotFoundError
from engine_plugin.host import PluginRegistry
from engine_plugin.manifest import platform_key
from tests.patience import LIMIT

from .conftest import FAKE_PLUGIN
from .plugins import make_plugin

if TYPE_CHECKING:
    from pathlib import Path


def test_valid_plugins_are_found_beside_invalid_ones(tmp_path: Path) -> None:
    make_plugin(tmp_path, "one")
    make_plugin(tmp_path, "two")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plugin.yaml").write_text("version: [")
    (tmp_path / "empty").mkdir()
    (tmp_path / "README").write_text("no plugin")
    registry = PluginRegistry.discover(tmp_path)
    assert registry.names == list(registry) == ["one", "two"]
    assert len(registry) == 2
    assert "one" in registry
    assert "broken" not in registry
    assert registry["two"] is registry.manifest("two")
    assert registry["two"].plugin_dir == tmp_path / "two"
    errors = [problem for problem in registry.problems if problem.severity == "error"]
    assert {problem.file for problem in errors} == {str(tmp_path / "broken" / "plugin.yaml")}


def test_json_manifest_is_read_if_there_is_no_yaml(tmp_path: Path) -> None:
    place = make_plugin(tmp_path, "one")
    manifest = yaml.safe_load((place / "plugin.yaml").read_text())
    (place / "plugin.json").write_text("not even JSON")
    assert PluginRegistry.discover(tmp_path)["one"].path.name == "plugin.yaml"
    (place / "plugin.yaml").unlink()
    (place / "plugin.json").write_text(json.dumps(manifest))
    assert PluginRegistry.discover(tmp_path)["one"].path.name == "plugin.json"


def test_directory_with_another_name_than_its_plugin_is_skipped(tmp_path: Path) -> None:
    make_plugin(tmp_path, "one", directory="another")
    registry = PluginRegistry.discover(tmp_path)
    assert registry.names == []
    [problem] = [problem for problem in registry.problems if problem.severity == "error"]
    assert "provider.name is 'one', but the directory is 'another'" in str(problem)
    assert problem.line == 3


def test_second_plugin_of_the_same_name_is_skipped(tmp_path: Path) -> None:
    make_plugin(tmp_path, "one")
    make_plugin(tmp_path, "one", directory="other")
    registry = PluginRegistry.discover(tmp_path)
    assert registry["one"].plugin_dir.name == "one"
    assert any("is already used by" in str(problem) for problem in registry.problems)


def test_unknown_plugin_or_directory_is_an_error(tmp_path: Path) -> None:
    make_plugin(tmp_path, "one")
    with pytest.raises(NotFoundError, match=r"no plugin is called 'two' in .*; found: one"):
        PluginRegistry.discover(tmp_path)["two"]
    with pytest.raises(NotFoundError, match=r"no such directory\. Create it"):
        PluginRegistry.discover(tmp_path / "nowhere")


async def test_launch_starts_the_executable_in_bin(tmp_path: Path, fake_environment: dict[str, str]) -> None:
    place = make_plugin(tmp_path, "one", program=FAKE_PLUGIN)
    registry = PluginRegistry.discover(tmp_path)
    async with await registry.launch("one", env=fake_environment, start_timeout=LIMIT) as plugin:
        assert plugin.name == "one"
        answer = await plugin.invoke("chat", {})
        assert answer["cwd"] == str((place / "bin").resolve())
        assert answer["argv"] == []


async def test_launch_without_an_executable_is_an_error(tmp_path: Path) -> None:
    make_plugin(tmp_path, "one")
    registry = PluginRegistry.discover(tmp_path)
    with pytest.raises(ManifestError, match=f"platforms.{platform_key()}.executable does not exist"):
        await registry.launch("one")


@pytest.mark.promise("X1")
@pytest.mark.skipif(sys.platform == "win32", reason="the permissions of Windows are not looked at")
async def test_plugin_that_another_user_could_change_is_skipped(tmp_path: Path) -> None:
    mine = make_plugin(tmp_path, "mine", program=FAKE_PLUGIN)
    open_to_all = make_plugin(tmp_path, "open", program=FAKE_PLUGIN)
    (open_to_all / "plugin.yaml").chmod(0o666)
    registry = PluginRegistry.discover(tmp_path)
    assert registry.names == ["mine"]
    [what] = [problem.what for problem in registry.problems if problem.severity == "error"]
    assert what.startswith("the file is not used, because another user could change it: ")
    assert what.endswith(f"{open_to_all / 'plugin.yaml'} can be written by every user")
    (mine / "bin").chmod(0o777)
    with pytest.raises(ManifestError, match=r"executable cannot be run: .*/bin can be written by every user"):
        await registry.launch("mine")
