"""Options, errors and statuses that all commands share."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from engine_plugin import __version__
from engine_plugin.cli.main import EXIT_CODES, cli
from tests.patience import LIMIT

from .conftest import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Workplace


def leaves(group: click.Group, ctx: click.Context, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, ctx, (*path, name))
        else:
            yield (*path, name)


COMMANDS = list(leaves(cli, click.Context(cli)))


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from engine_plugin.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'grpc', 'rich', 'httpx', 'yaml', 'google.protobuf', 'platformdirs'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_is_documented(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    assert command.help
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    assert f"engine-plugin {' '.join(path)}" in page
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in page, parameter.opts


def test_page_lists_every_exit_status() -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    for status in {0, 2, 130, *(status for _kind, status in EXIT_CODES)}:
        assert f"| {status} |" in page


def test_version_and_usage_are_printed(workplace: Workplace) -> None:
    workplace.apart = True
    assert __version__ in workplace.good("--version")
    assert "No such command" in workplace.bad(2, "nonsense")
    assert "Missing argument" in workplace.bad(2, "models", "load")
    assert "No such option" in workplace.bad(2, "models", "list", "--nonsense")


def test_plugin_is_selected_by_option_environment_or_directory(workplace: Workplace) -> None:
    """--plugin, then the environment, then the nearest manifest above, then the bundled one."""

    def plugin(*arguments: str, **env: str) -> str:
        done = workplace.run("engine", "status", "--json", *arguments, **env)
        name: str = json.loads(done.stdout)["plugin"]
        return name

    other = workplace.home / "other"
    other.mkdir()
    manifest = (workplace.plugin / "plugin.yaml").read_text()
    (other / "plugin.yaml").write_text(manifest.replace("fake-plugin", "other"))
    below = workplace.plugin / "bin" / "deep"
    below.mkdir(parents=True)
    here, workplace.plugin = workplace.plugin, below
    assert plugin() == "fake-plugin"
    assert plugin(ENGINE_PLUGIN_DIR=str(other)) == "other"
    assert plugin("--plugin", str(here), ENGINE_PLUGIN_DIR=str(other)) == "fake-plugin"
    workplace.plugin = workplace.home
    assert plugin() == "openvino-plugin"
    assert plugin("--plugin", "llamacpp") == "llamacpp-plugin"
    assert "'nowhere' does not exist; the bundled plugins are llamacpp, " in workplace.bad(
        2, "engine", "status", "--plugin", "nowhere"
    )
    done = workplace.run("--plugin", str(other), "--json", "engine", "status")
    assert json.loads(done.stdout)["plugin"] == "other"
    assert "there is no plugin.yaml in" in workplace.bad(3, "engine", "status", "--plugin", str(below))
    assert "ENGINE_PLUGIN_DIR" in workplace.bad(3, "engine", "status", ENGINE_PLUGIN_DIR=str(below))


def test_invalid_manifest_is_reported(workplace: Workplace) -> None:
    manifest = workplace.plugin / "plugin.yaml"
    manifest.write_text(
        manifest.read_text().replace("type: local", "type: nearby").replace("timeout: 60", "timeout: x")
    )
    said = workplace.bad(1, "engine", "status")
    assert len(said.splitlines()) == 2
    assert "plugin.yaml:6: error: " in said


def test_verbose_shows_the_traceback_and_the_log(workplace: Workplace) -> None:
    workplace.apart = True
    done = workplace.run("models", "rm", "tiny", "-v")
    assert done.returncode == 3
    assert "Traceback" in done.stderr
    assert "engine_plugin.host.fake-plugin" in done.stderr
    assert done.stderr.splitlines()[-1] == "engine-plugin: model: no model is called 'tiny'"


def test_lint_prints_problems_with_their_lines(workplace: Workplace) -> None:
    done = workplace.run("lint")
    assert done.returncode == 0, done.stdout
    manifest = workplace.plugin / "plugin.yaml"
    good = manifest.read_text()
    manifest.write_text(good.replace("name: fake\n", "name: fake\n  nonsense: 1\n").replace("type: local", "type: x"))
    done = workplace.run("lint", str(workplace.plugin), "--json")
    assert done.returncode == 1
    problems = json.loads(done.stdout)
    assert {problem["severity"] for problem in problems} >= {"error"}
    manifest.write_text(good.replace("name: fake\n", "name: fake\n  nonsense: 1\n"))
    done = workplace.run("lint")
    assert done.returncode == 1
    assert "engine.nonsense is no option. Remove it" in done.stdout
    assert "1 errors" in done.stderr or "1 error" in done.stderr
    manifest.write_text(good.replace("name: fake\n", "name: other\n"))
    assert "no engine is called 'other'" in workplace.run("lint").stdout
