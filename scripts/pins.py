"""The pins of constraints.txt: a version of each package for every platform and Python, and its files' hashes.

Standard library only: setup.py reads them before anything is installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CONSTRAINTS", "ROOT", "Pin", "canonical", "declared", "named", "project", "read_pins"]

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)\s*(?:;\s*(?P<marker>[^\\]*?))?\s*\\")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Pin:
    """One entry of a locked requirements file. `text` is the entry as it stands, hashes and line ends included."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]
    text: str


def canonical(name: str) -> str:
    """A distribution's name as the packaging specifications normalise it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(requirement: str) -> str:
    """The normalised name that a requirement such as `httpx>=0.28` begins with."""
    match = _NAME.match(requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return canonical(match.group())


def read_pins(path: Path = CONSTRAINTS) -> list[Pin]:
    """The entries of a locked requirements file; ValueError for one without a version or a hash."""
    text = path.read_text(encoding="utf-8")
    pins = []
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if not entry.strip():
            continue
        match = _PIN.match(entry)
        hashes = tuple(re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", entry))
        if match is None or not hashes:
            raise ValueError(f"{path.name}: no version and hash in {entry.splitlines()[0]!r}")
        name, version, marker = match.group("name", "version", "marker")
        pins.append(Pin(canonical(name), version, marker or "", hashes, entry))
    return pins


def project() -> dict[str, Any]:
    """pyproject.toml."""
    import tomllib  # not above: an older Python must get as far as setup's words about it

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def declared(*wanted: str) -> list[str]:
    """The requirements that pyproject.toml declares under each name: `core`, `build-system`, an extra or a group."""
    tables = project()
    sources = {
        "core": tables["project"]["dependencies"],
        "build-system": tables["build-system"]["requires"],
        **tables["project"]["optional-dependencies"],
        **tables["dependency-groups"],
    }
    return [requirement for name in (wanted or sources) for requirement in sources[name]]
