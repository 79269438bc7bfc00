"""Finds, loads, inspects and lints a manifest file."""

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

__all__ = ["MANIFEST_NAMES", "find_manifest", "inspect_manifest", "lint", "load_manifest", "manifest_file"]

MANIFEST_NAMES = ("plugin.yaml", "plugin.json")
"""The file names of a manifest, in order of precedence."""

# Even an invalid manifest has two of these sections, which distinguish it from another program's plugin.yaml.
_OUR_KEYS = re.compile(rb"""(?:^["']?|")(provider|services|platforms|engine)["']?[ \t]*:""", re.MULTILINE)
_ENOUGH_KEYS = 2


def manifest_file(directory: Path) -> Path | None:
    """Return the manifest in `directory` itself, if there is one. Called by hosts that scan a plugins directory."""
    return next((path for name in MANIFEST_NAMES if is_file(path := directory / name)), None)


def find_manifest(starts: Iterable[Path], *, passed_over: Callable[[str], None] = lambda _why: None) -> Path:
    """Return the nearest manifest in or above the first start that has one.

    Files that another user could change and the plugin.yaml of other programs (Helm has one, too) are ignored;
    `passed_over` receives a sentence about each. Called by the command line, and by a plugin whose program has no
    manifest beside it. Raises ManifestError with the searched directories and the ignored files.
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
    looked = " or ".join(f"in or above {place}" for place in places) or "in any directory"
    what = "; ".join([f"no {' or '.join(MANIFEST_NAMES)} found {looked}", *ignored])
    fix = "Put the manifest at the top of the plugin's directory, beside bin/"
    raise ManifestError([Problem(MANIFEST_NAMES[0], 0, what, fix)])


def _candidates(directory: Path) -> Iterator[Path]:
    for place in (directory, *directory.parents):
        for name in MANIFEST_NAMES:
            if is_file(place / name):
                yield place / name


def _unfit(path: Path) -> str:
    """Return why a file with a manifest's name is ignored, "" if it is not."""
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


def load_manifest(path: Path, environ: Mapping[str, str] | None = None, *, parsed: Path | None = None) -> Manifest:
    """Read a manifest. Raises ManifestError with all its errors; `inspect_manifest` returns warnings, too.

    `environ` replaces the process's environment. `parsed` is a file of `write_parsed` for the same content.
    """
    manifest, problems = inspect_manifest(path, environ, parsed=parsed)
    if manifest is None:
        raise ManifestError([problem for problem in problems if problem.severity == "error"])
    return manifest


def inspect_manifest(
    path: Path, environ: Mapping[str, str] | None = None, *, parsed: Path | None = None
) -> tuple[Manifest | None, list[Problem]]:
    """Read a manifest and return it with all problems, errors and warnings, in the order of their lines.

    The manifest is None if the file has errors, or if another user could change it: it names programs that run as
    this user. Never raises.
    """
    if is_file(path) and (doubt := distrust(path)):
        what = f"the file is not used, because another user could change it: {doubt.what}"
        return None, [Problem(str(absolute(path)), 0, what, doubt.fix)]
    manifest, problems = read_manifest(path, os.environ if environ is None else environ, parsed)
    return manifest, _in_order(problems)


def lint(
    path: Path,
    *,
    environ: Mapping[str, str] | None = None,
    check_engine: Callable[[Manifest], Sequence[Problem]] | None = None,
) -> list[Problem]:
    """Return all problems of a plugin, given its directory or its manifest. Never raises.

    In a directory with built executables, lint also checks these and the name of the directory. `check_engine` checks
    the engine's options if the rest is usable; it returns problems or raises ManifestError. Called by
    `engine-plugin lint`.
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
    """Return whether this is a built plugin rather than its source: the directory of executables exists.

    Checking the directory and not the executable finds a misspelt file name. A Windows path parses both separators.
    """
    tops = {PureWindowsPath(platform.executable).parts[0] for platform in manifest.platforms.values()}
    return any(exists(manifest.plugin_dir / top) for top in tops)


def _directory_problems(manifest: Manifest) -> Sequence[Problem]:
    name, directory = manifest.provider.name, manifest.plugin_dir.name
    if directory == name:
        return ()
    what = f"provider.name is {name!r}, but the plugin's directory is {directory!r}"
    fix = f"Rename the directory to {name}: AOG looks for the executable there"
    return [manifest.problem(("provider", "name"), what, fix, "warning")]
