"""Shell completion: requested as shells do, and in a real bash."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.shell_completion import shell_complete

from engine_plugin.cli.completion import PROGRAM, offer_shells
from engine_plugin.cli.context import COMPLETE, Options
from engine_plugin.cli.main import cli
from engine_plugin.cli.names import PATIENCE_VARIABLE
from tests.patience import LIMIT

from .conftest import COMMAND
from .showing import use_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .conftest import Workplace

SHELLS = ("bash", "zsh", "fish", "powershell")
MODELS = ("gemma3:4b", "gemma3:12b", "tiny")


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """A workplace with models."""
    use_engine(workplace, "showing:ShownEngine")
    workplace.env[PATIENCE_VARIABLE] = "30"  # a machine that is busy with other tests is no slow plugin
    (workplace.data / "models").mkdir(parents=True)
    for name in MODELS:
        (workplace.data / "models" / name).touch()
    return workplace


def bash_names(place: Workplace, line: str, **env: str) -> list[str]:
    """Return bash's completions at the end of that line."""
    asking = {COMPLETE: "bash_complete", "COMP_LINE": line, "COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
    return [entry.partition(",")[2] for entry in place.good(**asking | env).splitlines() if entry]


@pytest.fixture
def names(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """What PowerShell would be told: asked with the words before the cursor and the one that is being written."""
    offer_shells()

    def ask(*words: str) -> list[list[str]]:
        monkeypatch.setenv("COMP_WORDS", "\n".join(["engine-plugin", *words[:-1]]))
        monkeypatch.setenv("COMP_WORD", words[-1])
        assert shell_complete(cli, {"obj": Options()}, PROGRAM, COMPLETE, "powershell_complete") == 0
        return [line.split("\t") for line in capfd.readouterr().out.splitlines() if line]

    return ask


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_script_exists_for_each_shell(workplace: Workplace, shell: str) -> None:
    script = workplace.good("completion", shell)
    assert PROGRAM in script
    assert f"{COMPLETE}" in script
    assert f"{shell}_complete" in script
    assert "%(" not in script


def test_unknown_shell_error_lists_the_supported_ones(workplace: Workplace) -> None:
    assert "'csh' is not one of" in workplace.bad(2, "completion", "csh")


def test_commands_and_options_are_completed(names: Callable[..., list[list[str]]]) -> None:
    assert [name for name, _ in names("st")] == ["status"]
    assert {name for name, _ in names("engine", "st")} == {"start", "stop", "status"}
    assert names("completion", "f") == [["fish", "fish"]]
    assert ["--max-tokens", "Maximum number of tokens in an answer."] in names("chat", "--ma")
    assert names("chat", "--image", "") == []  # files are PowerShell's own matter


def test_model_names_are_completed(place: Workplace) -> None:
    assert bash_names(place, "engine-plugin models rm ") == sorted(MODELS)
    assert bash_names(place, "engine-plugin models use t") == ["tiny"]
    assert bash_names(place, f"engine-plugin --plugin {place.plugin} embed --model g") == ["gemma3:12b", "gemma3:4b"]


def test_bash_completes_model_names_after_a_colon(place: Workplace) -> None:
    assert bash_names(place, "engine-plugin chat --model=gemma3:1") == ["12b"]
    assert bash_names(place, "engine-plugin models rm gemma3:1", COMP_WORDBREAKS=" ") == ["gemma3:12b"]


def test_services_and_plugins_are_completed(place: Workplace) -> None:
    assert bash_names(place, "engine-plugin models use tiny --service ch") == ["chat"]
    assert {"llamacpp", "ollama"} <= set(bash_names(place, "engine-plugin --plugin "))
    asking = {COMPLETE: "bash_complete", "COMP_LINE": "engine-plugin --plugin ./x"}
    assert place.good(**asking) == "dir,./x\n"


def test_failing_completion_prints_nothing(place: Workplace) -> None:
    (place.plugin / "plugin.yaml").write_text("provider:\nengine: [")
    for line in (
        "engine-plugin models rm ",
        "engine-plugin models use tiny --service ",
        "engine-plugin chat --model ",
    ):
        done = place.run(**{COMPLETE: "bash_complete", "COMP_LINE": line})
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_completion_does_not_wait_for_a_slow_plugin(place: Workplace) -> None:
    del place.env[PATIENCE_VARIABLE]
    (place.data / "slow").touch()
    assert bash_names(place, "engine-plugin models rm ") == []


@pytest.mark.skipif(sys.platform == "win32", reason="bash is no shell of Windows")
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_completion_works_in_bash(place: Workplace, tmp_path: Path) -> None:
    binary = tmp_path / "bin" / "engine-plugin"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    script = """
        eval "$(engine-plugin completion bash)"
        COMP_LINE='engine-plugin models rm gemma3:1 and more' COMP_POINT=32
        _engine_plugin_completion engine-plugin 1 :
        printf '%s|' "${COMPREPLY[@]}"
        complete -p engine-plugin
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=place.env | {"PATH": os.pathsep.join([str(binary.parent), os.environ["PATH"]])},
        cwd=place.plugin,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.stderr == ""
    replies, _, registered = done.stdout.rpartition("|")
    assert replies == "12b"
    assert "-F _engine_plugin_completion engine-plugin" in registered
