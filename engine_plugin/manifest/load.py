"""Finding, loading, inspecting and linting a manifest file."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from engine_plugin.errors import ManifestError, Problem
from engine_plugin.manifest.document import MAX_BYTES
from engine_plugin.manifest.paths import absolute, exists, is_directory, is_file
from engine_plugin.manifest.schema import read_manifest
from engine_plugin.system.trust import distrust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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

# A manifest with mistakes is still one: two of its sections tell it from another program's file, by the text alone.
_OUR_KEYS = re.compile(rb"""(?:^["']?|")(provider|services|platforms|engine)["']?[ \t]*:""", re.MULTILINE)
_ENOUGH_KEYS = 2


def manifest_file(directory: Path) -> Path | None:
    """The manifest right in `directory`, if there is one. Called by hosts that scan a plugins directory."""
    for name in MANIFEST_NAMES:
        path = directory / name
        if is_file(path):
            return path
    return None


def find_manifest(starts: Iterable[Path], *, passed_over: Callable[[str], None] = lambda _why: None) -> Path:
    """The nearest manifest in or above each start, tried in turn.

    A file that another user could change, or that is the plugin.yaml of another program (Helm has one, too), is not
    taken; `passed_over` gets a sentence about it. Called by a plugin whose program has no manifest beside it, and by
    the command line. Raises ManifestError, naming the places looked at and the files passed over.
    """
    places, ignored = [], []
    for start in starts:
        directory = absolute(start)
        places.append(str(directory))
        for path in _candidates(directory):
            why = _unfit(path)
            if not why:
                return path
            ignored.append(why)
            passed_over(why)
    looked = " nor ".join(f"{place} or above it" for place in places) or "no directory at all"
    what = "; ".join([f"there is neither {' nor '.join(MANIFEST_NAMES)} in {looked}", *ignored])
    fix = "Put the manifest at the top of the plugin's directory, beside bin/"
    raise ManifestError([Problem(MANIFEST_NAMES[0], 0, what, fix)])


def _candidates(directory: Path) -> Iterator[Path]:
    for place in (directory, *directory.parents):
        for name in MANIFEST_NAMES:
            if is_file(place / name):
                yield place / name


def _unfit(path: Path) -> str:
    """Why a file that only bears a manifest's name is not taken; "" when it is."""
    if doubt := distrust(path):
        return f"{path} is ignored, because another user could change it: {doubt}"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES)
    except OSError as error:
        return f"{path} is ignored: {error.strerror}"
    if len(set(_OUR_KEYS.findall(text))) < _ENOUGH_KEYS:
        return f"{path} is ignored, because it is not a plugin manifest: it lacks provider, services and engine"
    return ""


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

    The manifest is None when what the file says is wrong, or when another user could change it: it names programs and
    options that run as this user. `check_files` adds an error, and leaves the manifest,
    when the executable for this machine is not declared, absent, or may not be executed. Never raises.
    """
    if is_file(path) and (doubt := distrust(path)):
        what = f"another user could change this file, so it is not used: {doubt.what}"
        return None, [Problem(str(absolute(path)), 0, what, doubt.fix)]
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
