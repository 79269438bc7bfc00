"""Child processes get the user's environment, without Python's settings and the working directory."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.process import python
from engine_plugin.process.environ import child_environ

if TYPE_CHECKING:
    from pathlib import Path

TELL = "import json, os, sys; print(json.dumps([os.getcwd(), dict(os.environ), sys.path, sys.flags.no_user_site]))"


@pytest.mark.promise("L5")
def test_environment_of_a_child_keeps_proxies_and_loader_settings_but_not_those_of_python() -> None:
    kept = {
        "HTTPS_PROXY": "http://p:1",
        "LD_LIBRARY_PATH": "/x",
        "SSL_CERT_FILE": "/c",
        "LD_PRELOAD": "/y",
        "HOME": "/h",
    }
    python_s = ("HOME", "PATH", "STARTUP", "OPTIMIZE", "WARNINGS", "USERBASE", "INSPECT", "PLATLIBDIR", "_GIL")
    given = kept | {f"PYTHON{name}": "1" for name in python_s} | {"__PYVENV_LAUNCHER__": "/z"}
    assert child_environ(given) == kept


@pytest.mark.promise("X1", "L5")
async def test_module_of_this_package_runs_with_its_own_packages_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "this.py").write_text("raise SystemExit('a module of the working directory')\n")
    monkeypatch.chdir(tmp_path)
    environ = dict(os.environ) | {"PYTHONHOME": "/nowhere", "PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "error"}
    status, out, err = await python.run_briefly(python.module_command("this"), python.module_environ(environ))
    assert (status, err) == (0, b"")
    assert b"Beautiful is better than ugly" in out


@pytest.mark.promise("X1")
async def test_program_does_not_run_in_the_working_directory_or_with_its_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [sys.executable, "-c", TELL]
    status, out, err = await python.run_briefly(argv, child_environ(os.environ))
    assert status == 0, err
    directory, environ, path, _ = json.loads(out)
    assert directory == tmp_path.anchor
    assert str(tmp_path) not in path
    assert "PYTHONPATH" not in environ


@pytest.mark.promise("X1")
def test_module_path_of_a_child_keeps_only_absolute_entries() -> None:
    given = os.pathsep.join(["/packages", "", ".", "relative"]) if os.name != "nt" else "C:\\packages"
    places = python.own_environ({"PYTHONPATH": given})["PYTHONPATH"].split(os.pathsep)
    assert places[1:] == [given.split(os.pathsep)[0]]
    assert python.own_command("engine_plugin.app")[1] == "-P"
