"""The command line in directories with files of other programs and other users."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.patience import LIMIT

from .conftest import COMMAND

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Workplace

HELM = 'name: "last"\nversion: "0.1.0"\nusage: "get the last release name"\ncommand: "$HELM_PLUGIN_DIR/last.sh"\n'
posix = pytest.mark.skipif(sys.platform == "win32", reason="the permissions of Windows are not looked at")


def moved(workplace: Workplace, place: Path) -> Workplace:
    """The workplace with the user in another directory."""
    place.mkdir(exist_ok=True)
    workplace.plugin = place
    return workplace


def installed(workplace: Workplace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command as the installed one is run: its own imports do not come from the working directory."""
    return subprocess.run(
        [COMMAND[0], "-P", *COMMAND[1:], *arguments],
        env=workplace.env,
        cwd=workplace.plugin,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


@pytest.mark.promise("T1")
def test_plugin_yaml_of_another_program_is_ignored_with_a_note(workplace: Workplace, tmp_path: Path) -> None:
    place = moved(workplace, tmp_path / "chart").plugin
    (place / "plugin.yaml").write_text(HELM)
    done = workplace.run("lint")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"{place / 'plugin.yaml'} is ignored, because it is not a plugin manifest") == 1
    named = workplace.run("lint", "--plugin", str(place))
    assert named.returncode == 1
    assert "provider" in named.stdout + named.stderr


@posix
@pytest.mark.promise("X1")
def test_manifest_and_module_of_another_user_are_not_run(workplace: Workplace, tmp_path: Path) -> None:
    place = moved(workplace, tmp_path / "shared").plugin
    trace = tmp_path / "trace"
    program = place / "x.sh"
    program.write_text(f"#!/bin/sh\necho program >> {trace}\n")
    program.chmod(0o755)
    for name in ("engine_plugin", "pip"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text(f"open({str(trace)!r}, 'a').write({name!r})\n")
    manifest = place / "plugin.yaml"
    text = (tmp_path / "plugins" / "fake-plugin" / "plugin.yaml").read_text()
    manifest.write_text(text.replace("name: fake\n", f"name: llamacpp\n  llama_server: {program}\n"))
    place.chmod(0o777)
    done = installed(workplace, "status")
    assert f"{place} can be written by every user" in done.stderr
    assert not trace.exists()
    place.chmod(0o755)
    manifest.write_text(text)
    done = installed(workplace, "models", "list")
    assert done.returncode == 0, done.stderr
    assert not trace.exists(), "a module beside the manifest was imported"


@posix
@pytest.mark.promise("X3")
@pytest.mark.parametrize("umask", [0, 0o277])
def test_data_directory_is_private_with_any_umask(workplace: Workplace, umask: int) -> None:
    if umask:  # what an earlier version made
        (workplace.data / "logs").mkdir(parents=True)
        (workplace.data / "logs" / "server.log").touch(0o644)
        workplace.data.chmod(0o700)
    for command in ("install", "start"):
        done = subprocess.run(
            [*COMMAND, "engine", command],
            env=workplace.env,
            cwd=workplace.plugin,
            umask=umask,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stderr
    workplace.good("engine", "stop")
    everything = [workplace.data, *workplace.data.rglob("*")]
    assert {path.name for path in everything} >= {"fake", "logs", "server.log"}
    assert {path: oct(path.lstat().st_mode) for path in everything if path.lstat().st_mode & 0o077} == {}


@posix
@pytest.mark.promise("X3", "L9")
def test_data_directory_that_another_user_could_change_is_rejected(workplace: Workplace) -> None:
    (workplace.data / "software").mkdir(parents=True)
    workplace.data.chmod(0o777)
    for command in (["status"], ["engine", "check"], ["serve"]):
        said = workplace.bad(4, *command)
        assert (
            f"the data directory {workplace.data} is not used: {workplace.data} can be written by every user" in said
        )
        assert f"chmod o-w {workplace.data}; or name another directory: resources.data_dir" in said
    workplace.data.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(workplace.data, 54321, -1)
        assert f"{workplace.data} belongs to another user (54321)" in workplace.bad(4, "status")
