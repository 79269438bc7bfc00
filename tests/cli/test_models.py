"""Models from the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.cli.lookup import entry_of, present
from engine_plugin.cli.progress import progress_display
from tests.patience import LIMIT

from .conftest import COMMAND, new_workplace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Workplace

pytestmark = pytest.mark.slow

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals of POSIX")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A workplace with a server that runs, for tests of what a pull asks it for."""
    with new_workplace(tmp_path_factory.mktemp("server")) as place:
        place.install()
        with place.serving():
            yield place


@pytest.fixture
def elsewhere(server: Workplace, tmp_path: Path) -> Workplace:
    """The same, for a person whose working directory is `here`, which holds an empty folder."""
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    return replace(server, plugin=here, env=server.env | {"ENGINE_PLUGIN_DIR": str(server.plugin)})


@pytest.mark.promise("T3")
def test_pulled_model_is_listed_until_removed(workplace: Workplace) -> None:
    done = workplace.run("models", "pull", "tiny")
    assert (done.returncode, done.stdout) == (0, "pulled tiny\n")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("resolving tiny")
    assert lines[1:-1] == ["downloading", *(f"{10 * part}% of 9.8 KiB" for part in (1, 2, 3, 4, 5, 10))]
    assert lines[-1] == "Try it: engine-plugin chat --model tiny"
    heads, row = workplace.good("models", "list").splitlines()
    assert heads.split() == ["NAME", "KIND", "SIZE", "CONTEXT", "CAPABILITIES", "QUANT", "MODIFIED"]
    assert row.split()[:6] == ["tiny", "chat", "9.8", "KiB", "chat", "Q4_0"]
    [entry] = json.loads(workplace.good("--json", "models", "list"))
    assert entry["size"] == 10_000
    assert workplace.good("models", "rm", "tiny") == "deleted tiny\n"
    assert workplace.bad(3, "models", "rm", "tiny") == "engine-plugin: model: no model is called 'tiny'\n"
    assert json.loads(workplace.good("models", "list", "--json")) == []
    done = workplace.run("models", "list")
    assert (done.stdout, done.stderr) == ("", "no models found. Pull one: engine-plugin models pull MODEL\n")


def test_pull_options_reach_the_engine(server: Workplace) -> None:
    digest = hashlib.sha256(b"").hexdigest()
    arguments = ["--name", "mine", "--sha256", digest, "--type", "chat", "--insecure", "--username", "me"]
    said = server.good(
        "models", "pull", "https://host/x.gguf", *arguments, "--json", ENGINE_PLUGIN_PULL_PASSWORD="secret"
    )
    steps = [json.loads(line) for line in said.splitlines()]
    assert steps[-1]["status"] == "success"
    what, _, options = steps[0]["status"].partition(" mine ")
    assert what == "resolving"
    assert json.loads(options) == {
        "source": "https://host/x.gguf",
        "sha256": digest,
        "insecure": True,
        "type": "chat",
        "username": "me",
        "password": 6,
    }


def test_relative_file_is_resolved_from_the_working_directory(server: Workplace) -> None:
    (server.plugin / "mine.gguf").touch()
    steps = [json.loads(line) for line in server.good("models", "pull", "mine.gguf", "--json").splitlines()]
    assert steps[0]["status"].startswith(f"resolving {server.plugin / 'mine.gguf'} ")
    assert server.good("models", "pull", "mine.gguf") == f"pulled {steps[-1]['model']}\n"


@pytest.mark.promise("T2")
@pytest.mark.parametrize("named", ["./folder", "folder/", "../here/folder", "{here}/folder"])
def test_relative_folder_is_resolved_from_the_working_directory(elsewhere: Workplace, named: str) -> None:
    here = elsewhere.plugin
    said = elsewhere.good("models", "pull", named.format(here=here), "--name", "mine", "--json")
    steps = [json.loads(line) for line in said.splitlines()]
    assert json.loads(steps[0]["status"].removeprefix("resolving mine "))["source"] == str(here / "folder")


@pytest.mark.promise("T2")
@pytest.mark.parametrize(("named", "is_path"), [("x.gguf", True), ("folder/x.GGUF", True), ("owner/x.gguf", False)])
def test_missing_file_in_an_existing_folder_is_treated_as_a_path(
    elsewhere: Workplace, named: str, is_path: bool
) -> None:
    here = elsewhere.plugin
    said = elsewhere.good("models", "pull", named, "--name", "mine", "--json")
    steps = [json.loads(line) for line in said.splitlines()]
    source = json.loads(steps[0]["status"].removeprefix("resolving mine "))["source"]
    assert source == (str(here / named) if is_path else named)


@pytest.mark.promise("T2")
@pytest.mark.parametrize("named", ["hf://", "https://hub/owner/name/"])
def test_url_that_ends_in_a_slash_is_not_a_path(elsewhere: Workplace, named: str) -> None:
    said = elsewhere.good("models", "pull", named, "--name", "mine", "--json")
    steps = [json.loads(line) for line in said.splitlines()]
    assert json.loads(steps[0]["status"].removeprefix("resolving mine "))["source"] == named


@pytest.mark.promise("T2")
def test_name_that_is_also_a_folder_is_treated_as_a_name(managed: Workplace) -> None:
    (managed.plugin / "nowhere").mkdir()
    said = managed.bad(3, "models", "pull", "nowhere")
    assert "To pull the folder nowhere in this directory: engine-plugin models pull ./nowhere\n" in said


def test_failed_pull_is_reported(server: Workplace) -> None:
    said = server.bad(1, "models", "pull", "broken")
    assert said.splitlines()[-1] == "engine-plugin: model: the content is not what sha256 says; pull it again"


@posix
def test_ctrl_c_keeps_the_partial_download(workplace: Workplace) -> None:
    pull = workplace.start("models", "pull", "slow")
    assert pull.stderr is not None
    try:
        for line in pull.stderr:
            if line == "waiting for more\n":
                break
        pull.send_signal(signal.SIGINT)
        said = pull.communicate(timeout=LIMIT)[1]
    finally:
        pull.kill()
        pull.communicate()
    assert pull.returncode == 130
    assert [line for line in said.splitlines() if line] == [
        "interrupted; run the same command to resume the pull",
        "engine-plugin: interrupted",
    ]
    assert workplace.journal == ["pull ended early"]


def at_terminal(workplace: Workplace, *arguments: str, typed: str = "") -> tuple[int, str]:
    """Run a command with a terminal for its input and errors; its status and what the terminal showed."""
    ours, its = os.openpty()
    try:
        if typed:
            os.write(ours, typed.encode())
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            env=workplace.env | {"TERM": "xterm", "COLUMNS": "120"},
            cwd=workplace.plugin,
            stdin=its,
            stdout=subprocess.DEVNULL,
            stderr=its,
        )
        os.close(its)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:
            pass  # Linux reports a closed terminal by EIO
        return process.wait(LIMIT), shown.decode()
    finally:
        os.close(ours)


@posix
def test_terminal_shows_a_progress_bar(workplace: Workplace) -> None:
    status, shown = at_terminal(workplace, "models", "pull", "tiny")
    assert status == 0
    assert "100%" in shown
    assert "9.8/9.8 KiB" in shown


@pytest.mark.promise("T5")
@posix
def test_rm_asks_for_confirmation_at_a_terminal(workplace: Workplace) -> None:
    workplace.install()
    with workplace.serving():
        workplace.good("models", "pull", "tiny")
        status, shown = at_terminal(workplace, "models", "rm", "tiny", typed="n\n")
        assert status == 1
        assert "Delete tiny? [y/N]" in shown
        assert "nothing deleted" in shown
        assert "tiny" in workplace.good("models", "list")
        assert at_terminal(workplace, "models", "rm", "tiny", typed="y\n")[0] == 0
        assert "tiny" not in workplace.good("models", "list")
        status, shown = at_terminal(workplace, "models", "rm", "tiny")
        assert status == 3
        assert "Delete" not in shown
        assert "no model is called 'tiny'" in shown


def rows(table: str) -> list[list[str]]:
    """The lines of a table, and their cells: two spaces or more stand between them."""
    return [[cell for cell in re.split(r"  +", line.strip()) if cell] for line in table.splitlines()]


def test_list_shows_the_capabilities(managed: Workplace) -> None:
    table = managed.good("models", "list")
    assert [row[:5] for row in rows(table)[:3]] == [
        ["NAME", "KIND", "SIZE", "CONTEXT", "CAPABILITIES"],
        ["embedder", "embed", "9.8 KiB", "512", "embedding"],
        ["guessed", "chat", "9.8 KiB", "~8192", "completion"],
    ]
    assert rows(table)[5][:5] == ["tagged:latest", "chat", "9.8 KiB", "40960", "completion, tools"]
    starts = {line.index("9.8 KiB") for line in table.splitlines()[1:]}
    assert starts == {table.index("SIZE")}


@pytest.mark.skipif(sys.platform == "win32", reason="no such file name there")
def test_control_characters_in_a_name_are_not_printed(managed: Workplace) -> None:
    (managed.data / "models" / "\x1b[2Jevil\n").touch()
    table = managed.good("models", "list")
    assert "\x1b" not in table
    assert len(table.splitlines()) == 7
    assert "\N{REPLACEMENT CHARACTER}[2Jevil" in table


@pytest.mark.skipif(sys.platform == "win32", reason="no such file name there")
def test_json_escapes_control_and_bidi_characters(managed: Workplace) -> None:
    evil = "\x9b2J\u202eevil\u2066é"
    (managed.data / "models" / evil).touch()
    said = managed.good("models", "list", "--json")
    assert "\\u009b2J\\u202eevil\\u2066é" in said
    assert evil in [entry["name"] for entry in json.loads(said)]


def test_show_prints_the_details(managed: Workplace) -> None:
    manifest = managed.plugin / "plugin.yaml"
    manifest.write_text(manifest.read_text().replace("default_model: tiny", "default_model: guessed"))
    shown = dict(line.split(":", 1) for line in managed.good("models", "show", "guessed").splitlines())
    facts = {name: value.strip() for name, value in shown.items()}
    assert facts | {"modified": ""} == {
        "name": "guessed",
        "kind": "chat",
        "size": "9.8 KiB",
        "capabilities": "completion",
        "context": "~8192 tokens (estimate)",
        "format": "bin",
        "family": "fake",
        "parameters": "1M",
        "quantization": "Q4_0",
        "digest": "sha256:00",
        "modified": "",
        "in memory": "1.9 GiB, 1.4 GiB, 5 min left",
        "default for": "chat",
    }
    entry = json.loads(managed.good("models", "show", "tagged", "--json"))
    assert (entry["name"], entry["running"], entry["loaded"], entry["default_for"]) == (
        "tagged:latest",
        False,
        {},
        [],
    )
    assert entry["details"]["capabilities"] == ["completion", "tools"]


def test_copy_adds_a_model(managed: Workplace) -> None:
    assert managed.good("models", "copy", "tagged", "mine") == "copied tagged to mine\n"
    assert (managed.data / "models" / "mine").stat().st_size == 10_000
    assert "no model is called 'gone'. Here are: embedder" in managed.bad(3, "models", "copy", "gone", "new")


def test_error_for_a_missing_model_names_only_pulls_that_work(managed: Workplace) -> None:
    """Only the plugin knows how its engine gets models."""
    said = managed.bad(3, "models", "show", "gone", "--plugin", "llamacpp")
    assert "no model is called 'gone'" in said
    assert "by a path or file:// URL ending in .gguf" in said
    assert "models pull gone" not in said


def test_progress_sums_the_layers_of_a_pull(managed: Workplace) -> None:
    done = managed.run("models", "pull", "new")
    assert (done.returncode, done.stdout) == (0, "pulled new\n")
    # A layer is known of when its turn comes.
    assert done.stderr.splitlines() == [
        "downloading",
        *("25% of 5.9 KiB", "50% of 5.9 KiB", "75% of 5.9 KiB", "100% of 5.9 KiB"),
        *("75% of 8.8 KiB", "83% of 8.8 KiB", "91% of 8.8 KiB", "100% of 8.8 KiB"),
        "100% of 9.8 KiB",
        "verifying sha256 digest",
        "Try it: engine-plugin chat --model new",
    ]


def test_progress_of_unknown_size_has_no_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(as_json=False) as show:
        show({"status": "downloading", "digest": "a", "completed": 5, "total": 10})
        show({"status": "downloading", "digest": "b", "completed": 5, "total": 0})
        show({"status": "downloading", "digest": "a", "completed": 10, "total": 10})
        show({"status": "downloading", "digest": "b", "completed": 6, "total": 10})
    assert capsys.readouterr().err.splitlines() == ["downloading", "50% of 10 bytes", "80% of 20 bytes"]


def test_models_ps_needs_a_running_engine(managed: Workplace) -> None:
    said = managed.bad(4, "models", "ps")
    assert "is not running; no models in memory. Start it: engine-plugin engine start" in said
    with managed.serving():
        assert rows(managed.good("models", "ps")) == [
            ["NAME", "KIND", "MEMORY", "VRAM", "CONTEXT", "IDLE"],
            ["embedder", "embed", "488 KiB", "0 bytes", "12 s"],
            ["guessed", "chat", "1.9 GiB", "1.4 GiB", "4096", "5 min left"],
        ]
        assert managed.good("models", "load", "tagged") == "loaded tagged\n"
        assert json.loads(managed.good("models", "unload", "tagged", "--json")) == {"unloaded": ["tagged"]}


@posix
def test_terminal_shows_one_bar_for_all_layers(managed: Workplace) -> None:
    status, shown = at_terminal(managed, "models", "pull", "new")
    assert status == 0
    assert "9.8/9.8 KiB" in shown
    assert shown.count("verifying sha256 digest") == 1
    assert "pulling manifest" not in shown
    assert "2.9 KiB" not in shown


@pytest.mark.promise("H3")
async def test_model_is_found_by_its_reference() -> None:
    class Listing:
        async def list_models(self) -> list[dict[str, Any]]:
            return [{"name": "other"}, {"name": "me/mine", "references": ["hf:me/mine@v1"]}]

    client: Any = Listing()
    assert await present(client, ["hf:me/mine@v1", "hf:me/gone"]) == ["hf:me/mine@v1"], "rm asks before it deletes"
    assert (await entry_of(client, "hf:me/mine@v1"))["name"] == "me/mine"
    assert (await entry_of(client, "me/mine"))["name"] == "me/mine"
