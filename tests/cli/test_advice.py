"""Commands that a message proposes work as printed, with the selected plugin."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import engine_plugin
from engine_plugin import catalogue
from engine_plugin.cli import advice
from engine_plugin.cli.context import Options
from tests.host.conftest import FAKE_PLUGIN
from tests.host.plugins import make_plugin

from .conftest import COMMAND

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def test_proposed_commands_name_the_plugin(text: str, advised: str, on_path: None) -> None:
    assert Options(named="ollama").advice(text) == advised
    assert Options().advice(text) == text


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put this Python's scripts on PATH."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    advice.program.cache_clear()
    yield
    advice.program.cache_clear()


@pytest.mark.promise("T5")
@pytest.mark.parametrize(
    ("text", "advised"),
    [
        ("Call StartEngine", "Run engine-plugin engine start"),
        ("have it run its own: call InstallEngine.", "have it run its own: run engine-plugin engine install."),
        ("damaged: call InstallEngine with cover", "damaged: run engine-plugin engine install --cover"),
        ("Pull it: PullModel 'a b'", "Pull it: engine-plugin models pull 'a b'"),
        ("ListModels shows the names", "engine-plugin models list shows the names"),
        ("unload others (UnloadModel NAME)", "unload others (engine-plugin models unload NAME)"),
        ("PullModelStream failed", "PullModelStream failed"),
    ],
)
def test_terminal_shows_commands_in_place_of_rpcs(text: str, advised: str, on_path: None) -> None:
    assert advice.advice(text) == advised


@pytest.mark.promise("T5")
def test_messages_of_the_plugin_contain_no_command_line() -> None:
    package = Path(engine_plugin.__file__).parent
    for entry in catalogue.CATALOGUE.values():
        assert "engine-plugin" not in entry.template
    for file in package.rglob("*.py"):
        if file.parts[len(package.parts)] in {"cli", "catalogue.py"}:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise | ast.Return) and (text := ast.unparse(node)):
                assert "engine-plugin engine" not in text, (file, text)
                assert "engine-plugin models" not in text, (file, text)


@pytest.mark.promise("T5")
@pytest.mark.skipif(sys.platform == "win32", reason="a script of POSIX")
@pytest.mark.parametrize("named", ["relative", "absolute", "module"])
def test_proposed_commands_begin_with_the_program_as_it_was_called(workplace: Workplace, named: str) -> None:
    script = Path(sys.executable).with_name("engine-plugin")
    workplace.env["PATH"] = os.defpath
    link = workplace.plugin / "bin" / "engine-plugin"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(script)
    program = {"relative": ["bin/engine-plugin"], "absolute": [str(script)], "module": COMMAND}[named]
    done = subprocess.run(
        [*program, "engine", "check"], env=workplace.env, cwd=workplace.plugin, capture_output=True, text=True
    )
    shown = {"relative": "./bin/engine-plugin", "absolute": str(script), "module": str(script)}[named]
    assert f"{shown} engine install\n" in done.stderr


def test_directory_with_a_space_is_quoted(on_path: None) -> None:
    said = Options(named="my plugin").advice("engine-plugin models list")
    assert shlex.split(said) == ["engine-plugin", "--plugin", "my plugin", "models", "list"]


@pytest.mark.parametrize("before", [True, False])
def test_proposed_command_names_the_plugin_as_the_user_did(workplace: Workplace, before: bool) -> None:
    named = ["--plugin", str(workplace.plugin)]
    command = ["engine", "check"]
    said = workplace.bad(4, *(named + command if before else command + named))
    assert f"engine-plugin --plugin {workplace.plugin} engine install" in said
    said = workplace.bad(4, "engine", "check")
    assert "Install it: engine-plugin engine install" in said


def test_notes_beside_the_answer_name_the_plugin_too(workplace: Workplace) -> None:
    named = ["--plugin", str(workplace.plugin)]
    done = workplace.run(*named, "status")
    assert f"engine-plugin --plugin {workplace.plugin} models pull" in done.stdout
    install = f"start it: engine-plugin --plugin {workplace.plugin} engine install"
    assert install in workplace.bad(4, *named, "engine", "status")


def test_plugin_of_a_host_is_named_by_its_directory(workplace: Workplace, tmp_path: Path) -> None:
    directory = make_plugin(tmp_path / "p", "fake", program=FAKE_PLUGIN).parent
    if os.name != "nt":
        workplace.env["FAKE_SOCKETS"] = str(workplace.runtime)
    # A message of the plugin's with a command in it; whose plugin it is only the host knows.
    request = '{"model": "engine-plugin models pull x"}'
    said = workplace.bad(3, "host", "call", str(directory), "fake", "DeleteModel", request)
    assert f"engine-plugin --plugin {directory / 'fake'} models pull x" in said


def test_environment_variable_selects_a_bundled_plugin(workplace: Workplace) -> None:
    chosen = {"ENGINE_PLUGIN_DIR": "ollama", "OLLAMA_HOST": "[::1]:9"}
    said = workplace.good("status", **chosen)
    assert "plugin:  ollama-plugin" in said
    assert "address: http://[::1]:9\n" in said
    assert "plugin:  openvino-plugin" in workplace.good("status", "--plugin", "openvino", **chosen)


def test_unknown_plugin_error_lists_the_bundled_ones(workplace: Workplace) -> None:
    for said in (
        workplace.bad(2, "--plugin", "olama", "status"),
        workplace.bad(3, "status", ENGINE_PLUGIN_DIR="olama"),
    ):
        assert "llamacpp, ollama, openai, openvino" in said


def test_terminal_control_characters_are_not_printed(workplace: Workplace) -> None:
    said = workplace.bad(3, "models", "show", "red\x1b[31m\x07")
    assert "\x1b" not in said
    assert "\x07" not in said
