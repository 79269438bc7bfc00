"""The command line as a host."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import pytest

from tests.host.conftest import FAKE_PLUGIN
from tests.host.plugins import make_plugin

from .chatting import NASTY
from .conftest import COMMAND

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Workplace

pytestmark = pytest.mark.slow


@pytest.fixture
def plugins(workplace: Workplace, tmp_path: Path) -> str:
    """A directory with a plugin that works."""
    make_plugin(tmp_path / "p", "fake", program=FAKE_PLUGIN)
    if os.name != "nt":
        workplace.env["FAKE_SOCKETS"] = str(workplace.runtime)
    return str(tmp_path / "p")


def test_host_list_shows_the_plugins(workplace: Workplace, plugins: str, tmp_path: Path) -> None:
    make_plugin(tmp_path / "p", "wrong", directory="place")
    done = workplace.run("host", "list", plugins)
    assert done.returncode == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["NAME", "VERSION", "SERVICES"],
        ["fake", "1.2.3", "chat"],
    ]
    assert "the directory is 'place'" in done.stderr
    found = json.loads(workplace.good("host", "list", plugins, "--json"))
    assert found["plugins"] == [{"name": "fake", "version": "1.2.3", "services": ["chat"]}]
    assert found["problems"][0]["line"] == 3


def test_host_call_prints_the_answer(workplace: Workplace, plugins: str) -> None:
    answer = json.loads(workplace.good("host", "call", plugins, "fake", "GetVersion"))
    assert answer == {"code": 200, "message": "", "response_json": {"version": "1.2.3"}}
    request = '{"service_name": "chat", "request_data": {"a": 1}}'
    answer = json.loads(workplace.good("host", "call", plugins, "fake", "invoke_service", request, "--start"))
    assert answer["response_data"]["request"] == {"a": 1}
    assert answer["response_data"]["calls"] == ["StartEngine", "InvokeService"]
    steps = workplace.good("host", "call", plugins, "fake", "PullModelStream", '{"model": "tiny"}').splitlines()
    assert json.loads(steps[-1])["data"] == {"status": "success"}


def test_failed_host_call_exits_with_its_status(workplace: Workplace, plugins: str) -> None:
    done = workplace.run("host", "call", plugins, "fake", "DeleteModel", '{"model": "big"}')
    assert done.returncode == 3
    assert json.loads(done.stdout)["code"] == 404
    assert done.stderr == "engine-plugin: no model is called 'big'\n"
    assert "no plugin is called 'other'" in workplace.bad(3, "host", "call", plugins, "other", "GetVersion")
    assert "no rpc is called" in workplace.bad(1, "host", "call", plugins, "fake", "Nonsense")
    assert "JSON" in workplace.bad(2, "host", "call", plugins, "fake", "GetVersion", "{")
    hang = '{"service_name": "hang", "request_data": {}}'
    workplace.bad(124, "host", "call", plugins, "fake", "InvokeService", hang, "--timeout", "0.3")


def test_plugin_that_does_not_start_is_reported(workplace: Workplace, plugins: str) -> None:
    said = workplace.bad(1, "host", "call", plugins, "fake", "GetVersion", FAKE_MODE="exit")
    assert "exited with code 3 before its handshake" in said
    assert "no such key" in said


def test_host_chat_prints_the_answer(workplace: Workplace, plugins: str) -> None:
    assert workplace.good("host", "chat", plugins, "fake", "Hello?") == "Hello\n"
    lines = workplace.good("host", "chat", plugins, "fake", "Hello?", "--json").splitlines()
    assert [json.loads(line)["choices"][0]["delta"]["content"] for line in lines] == ["Hel", "lo"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_host_chat_prints_no_control_characters(workplace: Workplace, plugins: str) -> None:
    from .screen import Screen

    with Screen(
        [*COMMAND, "host", "chat", plugins, "fake", "Hi"], workplace.env | {"FAKE_SAYS": NASTY}, workplace.plugin
    ) as screen:
        screen.until("Hello]0;title\r\n")
        assert screen.end() == 0
    assert NASTY.encode() not in screen.raw
