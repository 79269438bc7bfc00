"""Modules import only lower layers, and the code of an engine stays in its packages."""

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
REPOSITORY = PACKAGE.parent

# Each part and the parts that it may import. `goplugin` knows no engine: `app` puts the two together.
# `openvino_server` is a package of its own, whose processes import little of this one.
BASE = {"redaction", "errors", "catalogue", "failures", "messages", "waiting", "single_flight", "jsontext", "system"}
ENGINE = {
    "deadlines",
    "download",
    "engines/base",
    "engines/local",
    "engines/options",
    "install",
    "manifest",
    "models",
    "openai_api",
    "process",
    "protocol",
    "services",
    "speech",
    "templates",
    "transport",
} | BASE
MAY_IMPORT: dict[str, set[str]] = {
    "redaction": set(),
    "errors": {"redaction"},
    "failures": {"errors"},
    "catalogue": {"errors", "failures"},
    "waiting": set(),
    "single_flight": {"errors"},
    "jsontext": {"errors"},
    "system": {"errors", "jsontext"},
    "messages": set(),
    "manifest": BASE,
    "download": BASE,
    "models": {"download"} | BASE,
    "services": BASE,
    "deadlines": {"manifest"} | BASE,
    "process": BASE,
    "templates": {"process"} | BASE,
    "transport": {"process"} | BASE,
    "openai_api": {"transport"} | BASE,
    "openvino_server": {"models", "openai_api", "process", "services", "speech", "templates", "transport"} | BASE,
    "engines/base": {"download", "manifest", "models", "protocol", "services"} | BASE,
    "engines/options": {"manifest"} | BASE,
    "install": {"download", "engines/base", "manifest", "process", "protocol"} | BASE,
    "engines/local": ENGINE - {"engines/local", "openai_api", "services", "speech", "templates"},
    "speech": {"deadlines", "process", "transport"} | BASE,
    "engines/llamacpp": ENGINE,
    "engines/ollama": ENGINE,
    "engines/openai": ENGINE,
    "engines/openvino": ENGINE,
    "conversations": {"services"} | BASE,
    "plugin": {"conversations", "deadlines", "download", "engines/base", "manifest", "models", "protocol", "services"}
    | BASE,
    "protocol": set(),
    "rpc": {"errors"},
    "server": {"download", "engines/base", "models", "plugin", "protocol", "rpc", "services"} | BASE,
    "goplugin": {"protocol", "rpc", "server"} | BASE,
    "app": {"engines/base", "goplugin", "manifest", "plugin", "protocol", "server"} | BASE,
    "host": {"manifest", "protocol", "rpc"} | BASE,
    "cli": {"app", "engines/base", "host", "manifest", "models", "process", "server", "speech"} | BASE,
}

SHARED = {
    "errors",  # what `openai_api.conversation` raises
    "jsontext",  # JSON of requests, within bounds
    "models.info",  # the names of kinds and capabilities
    "openai_api.assemble",  # whole answers from the parts of a stream
    "openai_api.completions",  # log probabilities of a completion
    "openai_api.conversation",  # messages of a chat
    "openai_api.ranking",  # documents as texts
    "process.child",  # a process, its pipes and its end
    "process.entry",  # stdin of a program, and its failure
    "process.guard",  # ends with the parent process
    "process.health",  # processor time, by which a hung worker is found
    "process.lines",  # lines of output
    "process.memory",  # figures for an error of too little memory
    "process.python",  # the argv of a module
    "process.restarts",  # when a dead worker is restarted
    "services",  # what a request must hold
    "services.base",  # the fields of a request, checked
    "services.pictures",  # formats of pictures, and how many a request may have
    "speech.pcm",  # WAV files
    "system.data_urls",  # pictures in messages
    "system.files",  # JSON files of a model, within bounds
    "system.sizes",  # sizes in messages
    "templates.jinja",  # chat templates
    "templates.renderer",  # the process that renders them
    "transport.sse",  # server-sent events
    "waiting",  # bounded waits in clean-up
}
"""All that `openvino_server` takes from `engine_plugin`."""

ENGINES = ("llamacpp", "ollama", "openai", "openvino")
ENGINE_WORDS = re.compile(r"llama|openvino(?!:)|openai(?!:)", re.IGNORECASE)


def sources() -> list[Path]:
    """Every module of both packages, relative to the repository."""
    found = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "openvino_server").rglob("*.py")]
    return sorted(path.relative_to(REPOSITORY) for path in found if "stubs" not in path.parts)


SOURCES = sources()


def part_of(path: Path) -> str:
    return part_of_name(".".join(path.with_suffix("").parts))


def part_of_name(name: str) -> str:
    """The part that a module, or a name in one, belongs to; "" for what the package itself has."""
    package, _, rest = name.partition(".")
    if package != "engine_plugin":
        return package
    first, *more = rest.split(".")
    if first == "engines" and more and more[0] != "__init__":
        return f"engines/{more[0]}"
    return "" if first in {"__init__", "__version__", "__file__", "PLUGIN_DIR", "engines"} else first


class Source(NamedTuple):
    imports: set[str]
    """What it imports of both packages anywhere, for type checking too."""
    words: set[str]
    """Its names and string constants; not its comments and docstrings."""


@cache
def source(path: Path) -> Source:
    nodes = list(ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))))
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
    return {name for name in found if name.startswith(("engine_plugin.", "openvino_server."))}


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


def test_every_module_belongs_to_a_layer() -> None:
    parts = {part_of(path) for path in SOURCES} - {""}
    assert parts == set(MAY_IMPORT)
    assert set(TopologicalSorter(MAY_IMPORT).static_order()) == parts


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_modules_import_only_lower_layers(path: Path) -> None:
    part = part_of(path)
    used = {part_of_name(name) for name in imports(path)} - {part, ""}
    assert used <= MAY_IMPORT.get(part, set()), f"{part} must not import {used - MAY_IMPORT.get(part, set())}"


def test_embedded_server_imports_only_shared_modules() -> None:
    used = {name for path in SOURCES if part_of(path) == "openvino_server" for name in imports(path)}
    modules = {".".join(path.with_suffix("").parts) for path in SOURCES}
    found = {
        name if name in modules else name.rpartition(".")[0] for name in used if name.startswith("engine_plugin.")
    }
    assert found == {f"engine_plugin.{name}" for name in SHARED}


def test_imports_have_no_cycles() -> None:
    """Also not through others, and not for type checking."""
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    used = {
        module: {found for name in imports(path) if (found := name if name in modules else name.rpartition(".")[0])}
        for module, path in modules.items()
    }
    order = TopologicalSorter({module: names & modules.keys() - {module} for module, names in used.items()})
    order.prepare()


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_names_of_an_engine_occur_only_in_its_modules(path: Path) -> None:
    part = part_of(path)
    if part == "openvino_server" or part.removeprefix("engines/") in ENGINES:
        return
    foreign = {word for word in source(path).words if ENGINE_WORDS.search(word)} - {"engine_plugin.openai_api"}
    if part == "manifest":  # the host's own flavors of JSON, which it calls after engines
        foreign -= {"ollama", "openai", "openvino"}
    if path.name == "families.py":  # families of models, after one of which an engine is called
        foreign.clear()
    assert foreign == set()


def test_engines_do_not_import_each_other() -> None:
    for path in SOURCES:
        part = part_of(path)
        if part.removeprefix("engines/") in ENGINES:
            others = {f"engine_plugin.engines.{name}." for name in ENGINES if name != part.removeprefix("engines/")}
            assert not [name for name in imports(path) if name.startswith(tuple(others))], path
