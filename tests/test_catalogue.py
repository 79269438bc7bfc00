"""The catalogue of errors: each entry has a message and a fix, is used correctly, and occurs in a test."""

from __future__ import annotations

import ast
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import engine_plugin
import troubleshooting
from engine_plugin import catalogue
from engine_plugin.catalogue import CATALOGUE, FAMILIES
from engine_plugin.cli.advice import advice
from engine_plugin.cli.main import main as cli
from engine_plugin.errors import EnginePluginError, ModelNotFoundError, PullError
from engine_plugin.failures import Entry
from engine_plugin.models.store import ModelStore, PullRequest, bundled_samples
from tests.models.fakes import SAMPLES, Inspector
from tests.provoked import PROVOKED, due, listening

PACKAGE = Path(engine_plugin.__file__).parent
REPOSITORY = Path(__file__).parent.parent

ENTRIES = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)


def example(entry: Entry[Any]) -> dict[str, Any]:
    return dict(troubleshooting.EXAMPLES[entry.id])


# What an entry is


def test_catalogue_entry_has_one_name() -> None:
    listed = [entry for entries in FAMILIES.values() for entry in entries]
    assert list(CATALOGUE.values()) == listed
    assert len(CATALOGUE) == len(listed)
    constants = {name: value for name, value in vars(catalogue).items() if isinstance(value, Entry)}
    assert {name.lower().replace("_", "-"): value for name, value in constants.items()} == CATALOGUE
    assert set(constants) <= set(catalogue.__all__)


@ENTRIES
def test_catalogue_entry_has_a_message_and_a_fix(entry: Entry[Any]) -> None:
    error = entry.error(**example(entry))
    assert type(error) is entry.raises
    what, fix = entry.what.format(**example(entry)), entry.fix.format(**example(entry))
    assert error.message == f"{what}. {fix}"
    assert len(fix.split()) >= 2
    for part in (what, fix):
        assert part == part.strip()
        assert not part.endswith("."), "the message's end is the CLI's and the log's"
    assert entry.cause.endswith(".")
    assert entry.remedy.endswith(".")


@ENTRIES
def test_message_contains_all_fields(entry: Entry[Any]) -> None:
    told = entry.text(**example(entry))
    for name in entry.fields:
        other: Any = 123456789 if isinstance(example(entry)[name], int | float) else "something else"
        assert entry.text(**{**example(entry), name: other}) != told, name


@ENTRIES
def test_unknown_field_is_rejected(entry: Entry[Any]) -> None:
    with pytest.raises(TypeError, match=f"^{entry.id} needs"):
        entry.error(**example(entry), another=1)
    for name in entry.fields:
        fewer = example(entry)
        del fewer[name]
        with pytest.raises(TypeError, match=f"^{entry.id} needs"):
            entry.text(**fewer)


def test_braces_in_a_value_are_not_expanded() -> None:
    assert "'{place}'" in catalogue.model_missing("{place}").message
    assert "{0.__class__}" in catalogue.DISK_WRITE_REFUSED.text(place="{0.__class__}", reason="")


# A model that is missing


def test_missing_model_error_has_the_pull_command() -> None:
    error = catalogue.model_missing("qwen3:7b", near=["qwen3:8b", "qwen3:4b"], pull="qwen3:7b")
    assert type(error) is ModelNotFoundError
    assert error.pull == "qwen3:7b"
    assert error.message == (
        "model: no model is called 'qwen3:7b'. Did you mean qwen3:8b or qwen3:4b? Pull it: PullModel qwen3:7b"
    )


def test_missing_model_without_a_pull_lists_models_and_sources() -> None:
    error = catalogue.model_missing("a", here=[f"m{number}" for number in range(30)], sources="by a path")
    assert error.pull == ""
    assert "Here are: m0, " in error.message
    assert "m19" in error.message
    assert "m20" not in error.message
    assert "m19, 10 more. " in error.message
    long = catalogue.model_missing("a", here=[f"{number}{'m' * 98}" for number in range(10)]).message
    assert "m, 7 more. " in long
    assert len(long) < 500
    assert error.message.endswith("Others must be pulled first: by a path")
    alone = catalogue.model_missing("a" * 500).message
    assert "Here are: none. ListModels shows the names" in alone
    assert len(alone) < 300
    assert len(catalogue.model_missing("a" * 500, pull="a" * 500).message) < 300


def test_pull_command_is_quoted_for_the_shell() -> None:
    said = catalogue.model_missing("my model; rm -r x", pull="my model; rm -r x").message
    command = advice(said).partition("Pull it: ")[2]
    assert shlex.split(command)[-3:] == ["models", "pull", "my model; rm -r x"]


@pytest.mark.parametrize(
    ("platform", "words"), [("linux", "systemctl"), ("freebsd14", "systemctl"), ("darwin", "open"), ("win32", "menu")]
)
def test_fix_depends_on_the_system(platform: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert catalogue.on_this_system(linux="systemctl", macos="open", windows="menu") == words


# How entries are used


def uses() -> list[tuple[str, Entry[Any], set[str]]]:
    """Each message that the package makes from an entry: where, of which, and the fields that it gives."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"error", "error_as", "text"}
                and isinstance(node.func.value, ast.Attribute | ast.Name)
            ):
                name = ast.unparse(node.func.value).removeprefix("catalogue.")
                entry = getattr(catalogue, name, None)
                if isinstance(entry, Entry):
                    place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                    found.append((place, entry, {keyword.arg or "**" for keyword in node.keywords}))
    return found


def test_every_use_gives_the_required_fields() -> None:
    for place, entry, given in uses():
        assert given == entry.fields, f"{place}: {entry.id}"


def test_every_entry_is_used() -> None:
    assert {entry.id for _, entry, _ in uses()} == set(CATALOGUE)


# Every failure happens


def function(module: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return node
    raise AssertionError(f"there is no test {name}")


def test_every_entry_has_a_test() -> None:
    assert PROVOKED.keys() == CATALOGUE.keys()


@pytest.mark.parametrize("test", sorted(set(PROVOKED.values())))
def test_provoking_tests_exist(test: str) -> None:
    """tests/conftest.py checks that they provoke their entries."""
    path, _, name = test.partition("::")
    name, _, case = name.partition("[")
    found = function(ast.parse((REPOSITORY / "tests" / path).read_bytes()), name)
    if case:
        assert case in ast.unparse(found).partition("def ")[0], "no case of that test is called so"


def test_provoking_test_must_raise_its_entry() -> None:
    test = PROVOKED["model-kind-mismatch"]
    assert due(test) == due(f"{test}[chat]") == {"model-kind-mismatch"}
    assert due(f"{test}_too") == frozenset()
    assert due(f"{PROVOKED['sign-in-required']}-AuthError]") == {"sign-in-required"}
    with listening() as said:
        catalogue.ENGINE_NOT_RUNNING.error()
    catalogue.STREAM_UNSUPPORTED.error(service="embed", engine="this")
    assert said == {"engine-not-running"}


async def test_unwritable_directory_is_reported(tmp_path: Path) -> None:
    """A file is in the place of the directory, which stops root too."""
    root = tmp_path / "models"
    root.mkdir()
    (root / ".partial").write_text("")
    store = ModelStore(root, inspect=Inspector(), samples=bundled_samples())
    try:
        with pytest.raises(PullError, match=r"models.* Correct the permissions of the data directory"):
            [event async for event in store.pull(PullRequest("copy", source=str(SAMPLES / "tiny-chat.gguf")))]
    finally:
        await store.aclose()


@pytest.mark.skipif(sys.platform == "win32", reason="serves on a port there")
def test_taken_address_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "AOG_DATA_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    taken = tmp_path / "a"
    taken.write_text("")
    with pytest.raises(SystemExit):
        cli(["serve", "--address", f"unix:{taken}"])
    assert "path exists and is not a socket. Choose another --address" in capsys.readouterr().err
    assert taken.exists()


# The page


def test_page_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert troubleshooting.EXAMPLES.keys() == CATALOGUE.keys()
    assert troubleshooting.main(["--check"]) == 0, capsys.readouterr().err


def test_outdated_page_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "troubleshooting.md"
    monkeypatch.setattr(troubleshooting, "PAGE", page)
    assert troubleshooting.main(["--check"]) == 1
    assert "out of date: run python scripts/troubleshooting.py" in capsys.readouterr().err
    assert not page.exists()
    assert troubleshooting.main([]) == 0
    assert troubleshooting.main(["--check"]) == 0
    assert all(f"### {name}\n" in page.read_text() for name in CATALOGUE)


def test_every_entry_raises_an_engine_plugin_error() -> None:
    assert all(issubclass(entry.raises, EnginePluginError) for entry in CATALOGUE.values())
