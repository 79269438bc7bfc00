"""Finding a manifest, the executables that it names, and lint."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import ManifestError, Problem
from engine_plugin.manifest import (
    PLATFORM_KEYS,
    Manifest,
    find_manifest,
    inspect_manifest,
    lint,
    load_manifest,
    manifest_file,
)
from tests.manifest.conftest import GOOD, HERE, WITH_PROGRAM, changed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_manifest_is_found_from_the_directory_of_the_executable(write: Callable[..., Path]) -> None:
    path = write()
    start = path.parent / "bin"
    start.mkdir()
    assert find_manifest([start]) == path
    assert find_manifest([start / "linux-amd64" / "absent"]) == path


def test_nearest_manifest_wins_and_yaml_before_json(write: Callable[..., Path], tmp_path: Path) -> None:
    as_json = write('{"provider": {}, "engine": {}}', "plugin.json")
    assert find_manifest([as_json.parent]) == as_json
    assert manifest_file(as_json.parent) == as_json
    as_yaml = write()
    assert find_manifest([as_json.parent]) == as_yaml
    inner = as_yaml.parent / "inner"
    inner.mkdir()
    (inner / "plugin.json").write_text(as_json.read_text())
    (inner / "plugin.yaml").mkdir()
    assert find_manifest([inner]) == inner / "plugin.json", "a directory is no manifest"
    assert manifest_file(tmp_path) is None


def test_start_directories_are_tried_in_order(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write()
    other = tmp_path / "other"
    other.mkdir()
    assert find_manifest([other, path.parent / "bin"]) == path


def test_missing_manifest_error_lists_the_searched_directories(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        find_manifest([tmp_path / "one", tmp_path / "two"])
    assert str(tmp_path / "one") in str(caught.value)
    assert str(tmp_path / "two") in str(caught.value)
    with pytest.raises(ManifestError, match="found in any directory"):
        find_manifest([])


# Executables and lint


def test_platform_key_uses_the_names_of_go() -> None:
    system = {"linux": "linux", "darwin": "darwin", "win32": "windows"}[sys.platform]
    assert HERE.startswith(f"{system}_")
    assert HERE in PLATFORM_KEYS


def test_hosted_plugin_does_not_need_its_executable(write: Callable[..., Path], environ: dict[str, str]) -> None:
    path = write(WITH_PROGRAM)
    manifest = load_manifest(path, environ)
    with pytest.raises(ManifestError, match="executable does not exist") as caught:
        manifest.executable()
    assert [(problem.line, problem.severity) for problem in caught.value.problems] == [(13, "error")]
    assert inspect_manifest(path, environ) == (manifest, [])


def test_executable_for_this_machine_is_found(
    write: Callable[..., Path], environ: dict[str, str], make_executable: Callable[[Path], Path]
) -> None:
    path = write(WITH_PROGRAM)
    program = make_executable(path.parent / "bin" / "here" / "plugin")
    assert load_manifest(path, environ).executable() == program


def test_missing_executable_for_this_machine_is_reported(write: Callable[..., Path], environ: dict[str, str]) -> None:
    other = next(key for key in PLATFORM_KEYS if key != HERE)
    path = write(f"{GOOD}platforms:\n  {other}:\n    executable: plugin\n")
    with pytest.raises(ManifestError, match=f"no entry for this machine, {HERE}"):
        load_manifest(path, environ).executable()


@pytest.mark.skipif(os.name == "nt", reason="Windows tells executables by their names")
def test_executable_without_permission_is_reported(write: Callable[..., Path], environ: dict[str, str]) -> None:
    path = write(WITH_PROGRAM)
    program = path.parent / "bin" / "here" / "plugin"
    program.parent.mkdir(parents=True)
    program.write_text("")
    program.chmod(0o600)
    with pytest.raises(ManifestError, match=r"is not executable.*chmod \+x"):
        load_manifest(path, environ).executable()


def test_lint_of_a_source_directory_ignores_missing_executables(
    write: Callable[..., Path], environ: dict[str, str]
) -> None:
    path = write(changed("sample-plugin", "another-name") + WITH_PROGRAM.removeprefix(GOOD))
    assert lint(path.parent, environ=environ) == []
    assert lint(path, environ=environ) == []


def test_lint_of_a_built_directory_checks_executables(
    write: Callable[..., Path], environ: dict[str, str], make_executable: Callable[[Path], Path]
) -> None:
    path = write(WITH_PROGRAM)
    misspelt = make_executable(path.parent / "bin" / "here" / "plugni")
    problems = lint(path.parent, environ=environ)
    assert [(problem.line, problem.severity) for problem in problems] == [(13, "error")]
    misspelt.rename(misspelt.with_name("plugin"))
    assert lint(path.parent, environ=environ) == []
    path.write_text(path.read_text().replace("sample-plugin", "another-name"))
    problems = lint(path.parent, environ=environ)
    assert [(problem.line, problem.severity) for problem in problems] == [(3, "warning")]
    assert "Rename the directory to another-name" in problems[0].fix


def test_lint_includes_the_option_problems_of_the_engine(write: Callable[..., Path], environ: dict[str, str]) -> None:
    path = write(f"{GOOD}  threads: many\n  timout: 1\nplatform: {{}}\n")

    def complaint(manifest: Manifest) -> Problem:
        return manifest.problem(("engine", "threads"), "engine.threads is not a number", "Write a number")

    def returns(manifest: Manifest) -> list[Problem]:
        return [complaint(manifest)]

    def raises(manifest: Manifest) -> list[Problem]:
        raise ManifestError([complaint(manifest)])

    for check in (returns, raises):
        problems = lint(path, environ=environ, check_engine=check)
        assert [(problem.line, problem.severity) for problem in problems] == [(11, "error"), (13, "warning")]


def test_lint_of_an_invalid_manifest_skips_the_engine(write: Callable[..., Path], environ: dict[str, str]) -> None:
    def check(manifest: Manifest) -> list[Problem]:
        raise AssertionError(manifest)

    assert lint(write("{}"), environ=environ, check_engine=check)


def test_lint_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    (problem,) = lint(tmp_path)
    assert "no plugin.yaml or plugin.json" in problem.what
    (problem,) = lint(tmp_path / "absent")
    assert "cannot be read" in problem.what
