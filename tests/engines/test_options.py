"""The `engine:` section as a dataclass, and its problems with their lines."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.options import option_problems, read_options
from engine_plugin.errors import ManifestError
from engine_plugin.manifest import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine_plugin.manifest import Manifest

MANIFEST = """\
version: "1.0"
provider:
  name: sample-plugin
  version: 1.0.0
  type: local
services:
  - service_name: chat
    config_ref: openai:chat
engine:
  name: sample
"""
FIRST = MANIFEST.count("\n") + 1  # the line of the first option


@dataclass(frozen=True)
class Options:
    text: str = "default"
    count: int = field(default=4, metadata={"min": 1, "max": 9})
    share: float = field(default=0.5, metadata={"min": 0, "max": 1})
    switch: bool = False
    mode: str = field(default="auto", metadata={"choices": ("auto", "cpu", "gpu")})
    size: int = field(default=1, metadata={"choices": (1, 2, 4)})
    limit: int | None = field(default=None, metadata={"min": 1})
    label: str | None = None
    context_length: int = 8192
    config: str = field(default="", metadata={"valid": json.loads, "form": "JSON in a text"})


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Manifest]:
    def load(*lines: str) -> Manifest:
        path = tmp_path / "sample-plugin" / "plugin.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(MANIFEST + "".join(f"  {line}\n" for line in lines))
        return load_manifest(path, {"HOME": str(tmp_path), "AOG_DATA_DIR": str(tmp_path)})

    return load


def test_missing_options_get_their_defaults(manifest: Callable[..., Manifest]) -> None:
    assert read_options(Options, manifest()) == Options()


def test_valid_options_are_read(manifest: Callable[..., Manifest]) -> None:
    lines = ["text: x", "count: 9", "share: 1", "switch: true", "mode: gpu", "size: 4", "limit: 3", "label: y"]
    given = read_options(Options, manifest(*lines))
    assert given == Options("x", 9, 1, True, "gpu", 4, 3, "y")
    assert read_options(Options, manifest("limit: null", "label: ~")) == Options()


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("text: 5", "engine.text is 5", "It must be a text."),
        ("text: true", "engine.text is True", "It must be a text."),
        ("text: [a]", "engine.text is ['a']", "It must be a text."),
        ("text: null", "engine.text is None", "It must be a text."),
        ("count: '5'", "engine.count is '5'", "It must be a whole number."),
        ("count: 5.0", "engine.count is 5.0", "It must be a whole number."),
        ("count: true", "engine.count is True", "It must be a whole number."),
        ("count: 0", "engine.count is 0", "It must be at least 1."),
        ("count: 10", "engine.count is 10", "It must be at most 9."),
        ("share: a", "engine.share is 'a'", "It must be a number."),
        ("share: false", "engine.share is False", "It must be a number."),
        ("share: -0.1", "engine.share is -0.1", "It must be at least 0."),
        ("share: 1.5", "engine.share is 1.5", "It must be at most 1."),
        ("switch: 1", "engine.switch is 1", "It must be true or false."),
        ("switch: 'yes'", "engine.switch is 'yes'", "It must be true or false."),
        ("mode: GPU", "engine.mode is 'GPU'", "It must be one of auto, cpu, gpu."),
        ("mode: {a: b}", "engine.mode is {'a': 'b'}", "It must be one of auto, cpu, gpu."),
        ("size: 3", "engine.size is 3", "It must be one of 1, 2, 4."),
        ("size: true", "engine.size is True", "It must be a whole number."),
        ("limit: x", "engine.limit is 'x'", "It must be a whole number."),
        ("limit: 0", "engine.limit is 0", "It must be at least 1."),
        ("label: 3", "engine.label is 3", "It must be a text."),
        (
            "contxt_length: 5",
            "engine.contxt_length is not an option of this engine",
            "Did you mean 'context_length'?",
        ),
        (
            "zzzz: 5",
            "engine.zzzz is not an option of this engine",
            "Known options: text, count, share, switch, mode, size, limit, label, context_length, config.",
        ),
    ],
)
def test_invalid_option_is_reported_with_its_line(
    manifest: Callable[..., Manifest], line: str, what: str, fix: str
) -> None:
    loaded = manifest("# a comment", line)
    [problem] = option_problems(Options, loaded)
    assert (problem.what, problem.fix, problem.severity) == (what, fix, "error")
    assert (problem.file, problem.line) == (str(loaded.path), FIRST + 1)
    with pytest.raises(ManifestError) as caught:
        read_options(Options, loaded)
    assert caught.value.problems == (problem,)


def test_all_option_problems_are_reported_at_once(manifest: Callable[..., Manifest]) -> None:
    with pytest.raises(ManifestError) as caught:
        read_options(Options, manifest("count: x", "mode: auto", "share: 7", "nope: 1"))
    assert [problem.line for problem in caught.value.problems] == [FIRST, FIRST + 2, FIRST + 3]


def test_option_without_a_default_is_required(manifest: Callable[..., Manifest]) -> None:
    @dataclass
    class Strict:
        place: str
        seen: list[str] = field(default_factory=list, init=False)

    [problem] = option_problems(Strict, manifest())
    assert problem.what == "engine.place is missing"
    assert problem.fix == "Give it a text."
    assert problem.line == FIRST - 2, "the line of engine:"
    assert read_options(Strict, manifest("place: here")) == Strict("here")
    [problem] = option_problems(Strict, manifest("place: here", "seen: [a]"))
    assert problem.what == "engine.seen is not an option of this engine"


def test_engine_name_is_not_an_option(manifest: Callable[..., Manifest]) -> None:
    assert "name" not in manifest("count: 2").engine_options


@dataclass(frozen=True)
class Part:
    place: str
    os: str = field(default="", metadata={"choices": ("", "linux")})
    digest: str = field(default="", metadata={"pattern": "[0-9a-f]{4}", "form": "4 hex digits"})


@dataclass(frozen=True)
class Listing:
    parts: tuple[Part, ...] = ()


def test_list_of_mappings_is_read(manifest: Callable[..., Manifest], tmp_path: Path) -> None:
    assert read_options(Listing, manifest()) == Listing()
    assert read_options(Listing, manifest("parts: []")) == Listing()
    lines = ["parts:", "  - place: ${HOME}/a", "    digest: 00ff", "  - {place: b, os: linux}"]
    assert read_options(Listing, manifest(*lines)).parts == (Part(f"{tmp_path}/a", "", "00ff"), Part("b", "linux"))


@pytest.mark.parametrize(
    ("lines", "line", "what", "fix"),
    [
        (["parts: a"], 0, "engine.parts is 'a'", "It must be a list of mappings."),
        (["parts: [a]"], 0, "engine.parts[0] is 'a'", "It must be a mapping."),
        (["parts:", "  - {}"], 1, "engine.parts[0].place is missing", "Give it a text."),
        (
            ["parts:", "  - place: a", "    os: mac"],
            2,
            "engine.parts[0].os is 'mac'",
            "It must be one of nothing, linux.",
        ),
        (["parts:", "  - place: a", "    digest: 0"], 2, "engine.parts[0].digest is 0", "It must be a text."),
        (
            ["parts:", "  - place: a", "    digest: xyz"],
            2,
            "engine.parts[0].digest is 'xyz'",
            "It must be 4 hex digits.",
        ),
        (
            ["parts:", "  - place: a", "  - place: b", "    plce: c"],
            3,
            "engine.parts[1].plce is not an option of this engine",
            "Did you mean 'place'?",
        ),
    ],
)
def test_problem_inside_a_list_is_reported_with_its_line(
    manifest: Callable[..., Manifest], lines: list[str], line: int, what: str, fix: str
) -> None:
    [problem] = option_problems(Listing, manifest(*lines))
    assert (problem.what, problem.fix, problem.line - FIRST) == (what, fix, line)


@dataclass(frozen=True)
class Nested:
    parts: Listing = field(default_factory=Listing)
    whole: Options = field(default_factory=Options)
    one: Part | None = None


def test_nested_section_is_read(manifest: Callable[..., Manifest]) -> None:
    assert read_options(Nested, manifest()) == Nested()
    lines = ["whole: {count: 7}", "one:", "  place: here", "parts:", "  parts: [{place: b}]"]
    given = read_options(Nested, manifest(*lines))
    assert given == Nested(Listing((Part("b"),)), Options(count=7), Part("here"))


@pytest.mark.parametrize(
    ("lines", "line", "what", "fix"),
    [
        (["whole: 5"], 0, "engine.whole is 5", "It must be a mapping."),
        (["one: ~"], 0, "engine.one is None", "It must be a mapping."),
        (["whole:", "  text: x", "  count: 99"], 2, "engine.whole.count is 99", "It must be at most 9."),
        (["one:", "  os: linux"], 0, "engine.one.place is missing", "Give it a text."),
        (["whole: {cout: 1}"], 0, "engine.whole.cout is not an option of this engine", "Did you mean 'count'?"),
        (["parts:", "  parts: [3]"], 1, "engine.parts.parts[0] is 3", "It must be a mapping."),
    ],
)
def test_problem_inside_a_section_is_reported_with_its_line(
    manifest: Callable[..., Manifest], lines: list[str], line: int, what: str, fix: str
) -> None:
    [problem] = option_problems(Nested, manifest(*lines))
    assert (problem.what, problem.fix, problem.line - FIRST) == (what, fix, line)


def test_text_that_does_not_match_its_pattern_is_reported(manifest: Callable[..., Manifest]) -> None:
    assert read_options(Options, manifest("config: '[1]'")).config == "[1]"
    [problem] = option_problems(Options, manifest("config: '{oops'"))
    assert (problem.line, problem.fix) == (FIRST, "It must be JSON in a text.")
