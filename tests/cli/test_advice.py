"""Commands that a message proposes are those that help here: with the plugin that was chosen."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

import pytest

from engine_plugin.cli.options import Options
from tests.host.conftest import FAKE_PLUGIN
from tests.host.plugins import make_plugin

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Workplace


@pytest.mark.parametrize(
    ("text", "advised"),
    [
        ("Pull it: engine-plugin models pull x", "Pull it: engine-plugin --plugin ollama models pull x"),
        ("`engine-plugin engine start`)", "`engine-plugin --plugin ollama engine start`)"),
        (
            "engine-plugin engine stop && engine-plugin engine start",
            "engine-plugin --plugin ollama engine stop && engine-plugin --plugin ollama engine start",
        ),
        ("below ~/.local/share/engine-plugin models", "below ~/.local/share/engine-plugin models"),
        ("engine-plugin is a program", "engine-plugin is a program"),
        ("my-engine-plugin engine start", "my-engine-plugin engine start"),
    ],
)
def test_commands_name_the_plugin(text: str, advised: str) -> None:
    assert Options(named="ollama").advice(text) == advised
    assert Options().advice(text) == text


def test_a_directory_with_a_space_is_quoted() -> None:
    said = Options(named="my plugin").advice("engine-plugin models list")
    assert shlex.split(said) == ["engine-plugin", "--plugin", "my plugin", "models", "list"]


@pytest.mark.parametrize("before", [True, False])
def test_what_is_proposed_names_the_plugin_as_it_was_named(workplace: Workplace, before: bool) -> None:
    named = ["--plugin", str(workplace.plugin)]
    command = ["engine", "check"]
    said = workplace.bad(4, *(named + command if before else command + named))
    assert f"engine-plugin --plugin {workplace.plugin} engine install" in said
    said = workplace.bad(4, "engine", "check")
    assert "Install it: engine-plugin engine install" in said


def test_what_is_said_beside_the_answer_names_it_too(workplace: Workplace) -> None:
    named = ["--plugin", str(workplace.plugin)]
    done = workplace.run(*named, "status")
    assert f"engine-plugin --plugin {workplace.plugin} models pull" in done.stdout
    start = f"start it: engine-plugin --plugin {workplace.plugin} engine start"
    assert start in workplace.bad(4, *named, "engine", "status")


def test_a_host_s_plugin_is_named_by_its_place(workplace: Workplace, tmp_path: Path) -> None:
    directory = make_plugin(tmp_path / "p", "fake", program=FAKE_PLUGIN).parent
    if os.name != "nt":
        workplace.env["FAKE_SOCKETS"] = str(workplace.runtime)
    # A message of the plugin's with a command in it; whose plugin it is only the host knows.
    request = '{"model": "engine-plugin models pull x"}'
    said = workplace.bad(3, "host", "call", str(directory), "fake", "DeleteModel", request)
    assert f"engine-plugin --plugin {directory / 'fake'} models pull x" in said


def test_the_environment_may_name_a_plugin_of_the_package(workplace: Workplace) -> None:
    chosen = {"ENGINE_PLUGIN_DIR": "ollama", "OLLAMA_HOST": "[::1]:9"}
    said = workplace.good("status", **chosen)
    assert "plugin:  ollama-plugin" in said
    assert "address: http://[::1]:9\n" in said
    assert "plugin:  openvino-plugin" in workplace.good("status", "--plugin", "openvino", **chosen)


def test_a_plugin_that_is_none_is_answered_with_those_that_there_are(workplace: Workplace) -> None:
    for said in (
        workplace.bad(2, "--plugin", "olama", "status"),
        workplace.bad(3, "status", ENGINE_PLUGIN_DIR="olama"),
    ):
        assert "llamacpp, ollama, openai, openvino" in said


def test_what_moves_a_cursor_is_not_shown(workplace: Workplace) -> None:
    said = workplace.bad(3, "models", "show", "red\x1b[31m\x07")
    assert "\x1b" not in said
    assert "\x07" not in said
