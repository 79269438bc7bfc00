"""Imports run downhill only, and what is one engine's stays below that engine's name."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import engine_plugin

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = Path(engine_plugin.__file__).parent

# Each part and the parts that it may import. `goplugin` knows no engine: `hosted` puts the two together.
BASE = {
    "redaction",
    "errors",
    "limits",
    "catalogue",
    "failures",
    "waiting",
    "certificates",
    "jsontext",
    "addresses",
    "trust",
    "programs",
    "utf8",
}
MAY_IMPORT: dict[str, set[str]] = {
    "redaction": set(),
    "errors": {"redaction"},
    "failures": {"errors"},
    "catalogue": {"errors", "failures"},
    "waiting": set(),
    "trust": {"errors"},
    "utf8": set(),
    "programs": {"errors", "trust"},
    "certificates": set(),
    "jsontext": set(),
    "addresses": set(),
    "limits": set(),
    "socketdir": BASE,
    "manifest": BASE,
    "files": BASE,
    "download": {"files"} | BASE,
    "models": {"download", "files"} | BASE,
    "services": BASE,
    "engines": {"deadlines", "services", "models", "download", "files", "manifest", "socketdir"} | BASE,
    "deadlines": {"manifest"} | BASE,
    "plugin": {"deadlines", "services", "engines", "models", "download", "files", "manifest"} | BASE,
    "rpc": {"files", "plugin", "services", "engines", "models", "download"} | BASE,
    "goplugin": {"rpc", "socketdir"} | BASE,
    "hosted": {"goplugin", "rpc", "plugin", "engines", "manifest"} | BASE,
    "host": {"rpc", "manifest"} | BASE,
    "cli": {"host", "hosted", "rpc", "engines", "models", "manifest", "files", "socketdir"} | BASE,
}

ENGINES = ("llamacpp", "ollama", "openai", "openvino")

# The parts of `engines` and those of them that each may import; the engines themselves may import all but each other.
ENGINE_PARTS: dict[str, set[str]] = {
    "base": set(),
    "admission": set(),
    "options": set(),
    "pool": {"admission"},
    "shared": set(),
    "processes": set(),
    "templates": {"processes"},
    "http": {"processes"},
    "installing": {"base", "processes", "server"},
    "audio": {"base", "http", "processes"},
    "server": {"http", "options", "processes"},
    "driver": {"base", "installing", "pool", "processes", "server", "shared"},
}
ENGINE_WORDS = re.compile(r"llama|openvino(?!:)|openai(?!:)", re.IGNORECASE)


SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if "stubs" not in path.parts]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


class Source(NamedTuple):
    imports: set[str]
    """The modules of ours that it imports anywhere, for type checking too."""
    words: set[str]
    """Its names and string constants; not its comments and docstrings."""


@cache
def source(path: Path) -> Source:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return Source(imported(nodes, path), code_words(nodes))


def imports(path: Path) -> set[str]:
    return source(path).imports


def imported(nodes: Sequence[ast.AST], path: Path) -> set[str]:
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("engine_plugin.")}


def code_words(nodes: Sequence[ast.AST]) -> set[str]:
    prose = {node.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}
    words: set[str] = set()
    for node in nodes:
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word) | ast.arg(arg=word):
                words.add(word)
            case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word) | ast.ClassDef(name=word):
                words.add(word)
            case ast.Constant(value=str(word)) if node not in prose:
                words.add(word)
    return words


def test_every_part_has_its_place() -> None:
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts == set(MAY_IMPORT)
    assert set(TopologicalSorter(MAY_IMPORT).static_order()) == parts


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downhill(path: Path) -> None:
    part = part_of(path)
    used = {name.split(".")[1] for name in imports(path)} - {part, "__version__", "__file__", "PLUGIN_DIR"}
    assert used <= MAY_IMPORT.get(part, set()), f"{part} must not import {used - MAY_IMPORT.get(part, set())}"


def test_the_host_side_uses_only_the_wires_messages() -> None:
    wire = {name for path in SOURCES if part_of(path) == "host" for name in imports(path) if ".rpc." in name}
    assert wire
    assert all(name.startswith("engine_plugin.rpc.stubs.") for name in wire)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_an_engines_words_stay_with_it(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts
    if place[0] == "engines" and len(place) > 1 and place[1] in ENGINES:
        return
    foreign = {word for word in source(path).words if ENGINE_WORDS.search(word)}
    if part_of(path) == "manifest":  # the host's own flavours of JSON, which it calls after engines
        foreign -= {"ollama", "openai", "openvino"}
    if place == ("models", "families.py"):  # families of models, after one of which an engine is called
        foreign.clear()
    assert foreign == set()


def test_engines_parts_have_their_order() -> None:
    used: dict[str, set[str]] = {}
    for path in SOURCES:
        place = path.relative_to(PACKAGE).parts
        if place[0] == "engines" and place[1] != "__init__.py":
            part = place[1].removesuffix(".py")
            names = {name.split(".")[2] for name in imports(path) if name.startswith("engine_plugin.engines.")}
            used.setdefault(part, set()).update(names - {part})
    assert {part: names for part, names in used.items() if part not in ENGINES} == ENGINE_PARTS
    assert set(TopologicalSorter(ENGINE_PARTS).static_order()) == set(ENGINE_PARTS)


def test_engines_do_not_know_each_other() -> None:
    for path in SOURCES:
        place = path.relative_to(PACKAGE).parts
        if place[0] == "engines":
            others = {f"engine_plugin.engines.{name}." for name in ENGINES if name not in place}
            assert not [name for name in imports(path) if name.startswith(tuple(others))], path
