"""Finding, loading, inspecting and linting a manifest file."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from engine_plugin.errors import ManifestError, Problem
from engine_plugin.manifest.paths import absolute, exists, is_directory, is_file
from engine_plugin.manifest.schema import read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from engine_plugin.manifest.model import Manifest

__all__ = [
    "MANIFEST_NAMES",
    "find_manifest",
    "inspect_manifest",
    "lint",
    "load_manifest",
    "manifest_file",
]

MANIFEST_NAMES = ("plugin.yaml", "plugin.json")
"""What a manifest may be called; the first that exists counts."""


def manifest_file(directory: Path) -> Path | None:
    """The manifest right in `directory`, if there is one. Called by hosts that scan a plugins directory."""
    for name in MANIFEST_NAMES:
        path = directory / name
        if is_file(path):
            return path
    return None


def find_manifest(starts: Iterable[Path]) -> Path:
    """The nearest manifest in or above each start, tried in turn.

    A hosted plugin calls it with its working directory, then with its executable's: AOG starts a plugin two
    directories above its executable, which is <plugin>/bin and not <plugin>. Raises ManifestError, naming the
    places looked at.
    """
    places = []
    for start in starts:
        directory = absolute(start)
        places.append(str(directory))
        for candidate in (directory, *directory.parents):
            if found := manifest_file(candidate):
                return found
    looked = " nor ".join(f"{place} or above it" for place in places) or "no directory at all"
    what = f"there is neither {' nor '.join(MANIFEST_NAMES)} in {looked}"
    fix = "Put the manifest at the top of the plugin's directory, beside bin/"
    raise ManifestError([Problem(MANIFEST_NAMES[0], 0, what, fix)])


def load_manifest(path: Path, environ: Mapping[str, str] | None = None, *, check_files: bool = False) -> Manifest:
    """Read one manifest. Raises ManifestError with every error in it; warnings are left to `inspect_manifest`.

    `environ` stands for the process's environment. A plugin that loads its own manifest leaves `check_files`
    off: it runs already, however it was started. A host sets it before a launch.
    """
    manifest, problems = inspect_manifest(path, environ, check_files=check_files)
    errors = [problem for problem in problems if problem.severity == "error"]
    if manifest is None or errors:
        raise ManifestError(errors)
    return manifest


def inspect_manifest(
    path: Path, environ: Mapping[str, str] | None = None, *, check_files: bool = False
) -> tuple[Manifest | None, list[Problem]]:
    """Read one manifest and return it with all problems, errors and warnings, in the order of their lines.

    The manifest is None when what the file says is wrong. `check_files` adds an error, and leaves the manifest,
    when the executable for this machine is not declared, absent, or may not be executed. Never raises.
    """
    manifest, problems = read_manifest(path, os.environ if environ is None else environ)
    if manifest is not None and check_files:
        problems += _executable_problems(manifest)
    return manifest, _in_order(problems)


def lint(
    path: Path,
    *,
    environ: Mapping[str, str] | None = None,
    check_engine: Callable[[Manifest], Sequence[Problem]] | None = None,
) -> list[Problem]:
    """Everything that is wrong with a plugin: a directory with a manifest in it, or a manifest. Never raises.

    In a directory that holds built executables, these are checked too, and that the directory bears the plugin's
    name. `check_engine` judges the engine's options when the rest can be used; it may return problems or raise
    ManifestError. Called by `engine-plugin lint`.
    """
    file = path
    if is_directory(path):
        found = manifest_file(path)
        if found is None:
            what = f"there is no {' or '.join(MANIFEST_NAMES)} in this directory"
            return [Problem(str(path), 0, what, "Name the directory of a plugin")]
        file = found
    manifest, problems = inspect_manifest(file, environ)
    if manifest is None:
        return problems
    if _is_built(manifest):
        problems += _executable_problems(manifest)
        problems += _directory_problems(manifest)
    if check_engine is not None:
        try:
            problems += check_engine(manifest)
        except ManifestError as error:
            problems += error.problems
    return _in_order(problems)


def _in_order(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: problem.line)


def _executable_problems(manifest: Manifest) -> Sequence[Problem]:
    try:
        manifest.executable()
    except ManifestError as error:
        return error.problems
    return ()


def _is_built(manifest: Manifest) -> bool:
    """Whether this is a plugin as it is installed rather than its source: a place for executables exists.

    The place and not the executable, so that a misspelt file name is found. A Windows path reads both separators.
    """
    tops = {PureWindowsPath(platform.executable).parts[0] for platform in manifest.platforms.values()}
    return any(exists(manifest.plugin_dir / top) for top in tops)


def _directory_problems(manifest: Manifest) -> Sequence[Problem]:
    name, directory = manifest.provider.name, manifest.plugin_dir.name
    if directory == name:
        return ()
    what = f"provider.name is {name!r}, but the plugin's directory is called {directory!r}"
    fix = f"Rename the directory to {name}: AOG looks for the executable there"
    return [manifest.problem(("provider", "name"), what, fix, "warning")]
