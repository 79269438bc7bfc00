"""The engine's software and its background server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.process.records import ProcessRecords
from tests.patience import LIMIT

if TYPE_CHECKING:
    from .conftest import Workplace

pytestmark = pytest.mark.slow


def test_check_reports_missing_software_until_install(workplace: Workplace) -> None:
    said = workplace.bad(4, "engine", "check")
    assert said == "engine-plugin: not installed: no fake is here. Install it: engine-plugin engine install\n"
    done = workplace.run("engine", "check", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (4, {"installed": False, "detail": "no fake is here"})
    done = workplace.run("engine", "install")
    assert (done.returncode, done.stdout) == (0, "installed: fake 1.0\n")
    assert done.stderr == "fetching fake 1.0\ndownloading\n100% of 9.8 KiB\n"
    assert workplace.good("engine", "check") == "installed: fake 1.0\n"
    assert json.loads(workplace.good("engine", "install", "--cover", "--json"))["installed"] is True
    assert (workplace.data / "installed").read_text() == "True"
    done = workplace.run("engine", "upgrade")
    assert (done.returncode, done.stdout) == (0, "fake 1.0\n")
    assert json.loads(workplace.good("engine", "upgrade", "--json")) == {"detail": "fake 1.0"}


@pytest.mark.promise("G40")
def test_engine_start_and_stop_control_a_background_server(workplace: Workplace) -> None:
    workplace.apart = True
    workplace.good("engine", "install")
    said = workplace.good("engine", "start", "--mode", "cpu")
    try:
        assert said.startswith("fake-plugin is running at unix:")
        started = json.loads(workplace.good("engine", "start", "--json"))
        assert f"(pid {started['pid']})" in said
        assert psutil.Process(started["pid"]).is_running()
        assert workplace.journal == ["start cpu", "start auto"]

        status = json.loads(workplace.good("engine", "status", "--json"))
        assert status["running"] is True
        assert status["state"].startswith("ready")
        assert status["version"] == "1.0"
        assert status["address"] == started["address"]
        assert status["models"] == []

        workplace.good("models", "pull", "tiny")
        assert workplace.good("models", "load", "tiny") == "loaded tiny\n"
        assert "tiny" in workplace.good("models", "ps")
        assert "model:   tiny (9.8 KiB)" in workplace.good("engine", "status")
        assert "already" in workplace.bad(4, "serve")
        assert workplace.good("models", "unload", "tiny") == "unloaded tiny\n"
        assert workplace.bad(4, "models", "unload", "tiny") == "engine-plugin: model: tiny is not loaded\n"
        assert json.loads(workplace.good("models", "ps", "--json")) == []
    finally:
        said = workplace.good("engine", "stop")
    assert said == "fake-plugin is stopped\n"
    assert workplace.journal[-1] == "stop"
    assert not psutil.pid_exists(started["pid"]) or not workplace.processes()
    assert workplace.bad(4, "engine", "status") == "start it: engine-plugin engine start\n"
    assert not list((workplace.data / "run").glob("*.server"))
    assert not list(workplace.runtime.rglob("*.sock"))


def test_commands_that_need_a_server_report_it(workplace: Workplace) -> None:
    for command in (["models", "ps"], ["models", "load", "tiny"], ["models", "unload", "tiny"]):
        assert "Start it: engine-plugin engine start" in workplace.bad(4, *command)
    assert "fake-plugin is not running" in workplace.bad(4, "engine", "stop")
    done = workplace.run("engine", "status", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["state"] == "stopped"


def test_failed_start_leaves_no_server(workplace: Workplace) -> None:
    assert "fake is not installed" in workplace.bad(4, "engine", "start")
    assert workplace.processes() == []
    workplace.install()
    assert "there is no GPU" in workplace.bad(4, "engine", "start", "--mode", "gpu")


def test_data_directory_that_cannot_be_created_is_reported(workplace: Workplace) -> None:
    workplace.data.parent.mkdir(parents=True)
    workplace.data.write_text("a file in its place")
    said = workplace.bad(1, "engine", "start")
    assert f"{workplace.data}" in said
    assert said.endswith("Correct the permissions of the data directory, or move it\n")


def test_concurrent_starts_share_one_server(workplace: Workplace) -> None:
    workplace.install()
    begun = [workplace.start("engine", "start", "--json") for _ in range(3)]
    try:
        said = [process.communicate(timeout=LIMIT) for process in begun]
        assert [process.returncode for process in begun] == [0, 0, 0], said
        assert len({json.loads(output)["pid"] for output, _ in said}) == 1
    finally:
        workplace.run("engine", "stop")


def test_server_that_cannot_start_shows_its_log(workplace: Workplace) -> None:
    manifest = workplace.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("name: fake\n", "name: unknown\n"))
    said = workplace.bad(4, "engine", "start")
    assert "the server exited with code 1" in said
    assert "no engine is called 'unknown'" in said


@pytest.mark.promise("P27")
def test_record_of_a_killed_server_is_ignored(workplace: Workplace) -> None:
    workplace.install()
    started = json.loads(workplace.good("engine", "start", "--json"))
    server = psutil.Process(started["pid"])
    server.kill()
    psutil.wait_procs([server], timeout=LIMIT)
    assert list((workplace.data / "run").glob("*.server"))
    assert "not running" in workplace.bad(4, "engine", "stop")
    again = json.loads(workplace.good("engine", "start", "--json"))
    assert again["pid"] != started["pid"]
    workplace.good("engine", "stop")


@pytest.mark.promise("P11")
def test_process_with_a_reused_pid_is_left_alone(workplace: Workplace) -> None:
    workplace.install()
    started = json.loads(workplace.good("engine", "start", "--json"))
    try:
        [record] = (workplace.data / "run").glob("*.server")
        good = record.read_text()
        record.write_text(json.dumps(json.loads(good) | {"pid": psutil.Process().pid}))
        assert "not running" in workplace.bad(4, "engine", "stop")
        record.write_text(good)
    finally:
        workplace.good("engine", "stop")
    assert not [process for process in workplace.processes() if process.pid == started["pid"]]


@pytest.mark.promise("L2")
def test_record_of_a_server_survives_the_start_of_its_engine(workplace: Workplace) -> None:
    """The engine removes old process records from the same directory."""
    workplace.install()
    started = json.loads(workplace.good("engine", "start", "--json"))
    try:
        left = workplace.data / "run" / "1-00000000.json"
        left.write_text("not a record")
        assert ProcessRecords(workplace.data / "run").reap() == []
        assert not left.exists()
        assert json.loads(workplace.good("engine", "status", "--json"))["pid"] == started["pid"]
    finally:
        workplace.good("engine", "stop")


@pytest.mark.promise("L2")
@pytest.mark.parametrize("lost", ["the socket", "its directory"])
def test_server_is_found_after_its_socket_was_removed(workplace: Workplace, lost: str) -> None:
    """A cleaner of temporary files or the end of a login session removes it with the whole runtime directory."""
    workplace.install()
    started = json.loads(workplace.good("engine", "start", "--json"))
    try:
        path = Path(started["address"].removeprefix("unix:"))
        if lost == "the socket":
            path.unlink()
        else:
            path.parent.parent.chmod(0o755)  # no longer the user's alone: the server moves
            shutil.rmtree(path.parent)
        status = json.loads(workplace.good("engine", "status", "--json"))
        assert (status["pid"], status["running"]) == (started["pid"], True)
        assert (status["address"] == started["address"]) is (lost == "the socket")
        assert json.loads(workplace.good("engine", "start", "--json"))["pid"] == started["pid"]
        assert f"(pid {started['pid']})" in workplace.bad(4, "serve")
    finally:
        workplace.good("engine", "stop")
    assert workplace.processes() == []
