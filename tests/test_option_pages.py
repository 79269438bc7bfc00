"""The pages for packagers name every option of an engine, with its default, and no other one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from engine_plugin.engines.llamacpp.options import LlamaCppOptions
from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.openai.options import OpenAIOptions
from engine_plugin.engines.openvino.options import OpenVinoOptions
from engine_plugin.engines.options import Kind, Table, keys_of

DOCS = Path(__file__).parents[1] / "docs"
HEADING = re.compile(r"^(#+) (.*)$")
ROW = re.compile(r"^\| `(\w+)` \|([^|]*)\|")


def pages_options(page: str) -> dict[str, dict[str, str]]:
    """What stands in the tables of the page's section Options: by section ("" for the first), names with defaults."""
    found: dict[str, dict[str, str]] = {}
    inside, section, table = False, "", ""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if heading := HEADING.match(line):
            if heading[1] == "##":
                inside, section = heading[2] == "Options", ""
            elif inside:
                section = heading[2].partition(":")[0].strip("`")
        elif line.startswith("| option "):
            table = "options"
        elif not line.startswith("|"):
            table = ""
        elif inside and table and (row := ROW.match(line)):
            found.setdefault(section, {})[row[1]] = row[2].strip()
    return found


def sections(kind: Kind, name: str = "") -> dict[str, Table]:
    """The keys of options, and those of their sections, by name."""
    found = {name: keys_of(kind)}
    for key, (hint, _, _) in found[name].items():
        for inner in [hint, *get_args(hint)] if get_origin(hint) is not tuple else ():
            if isinstance(inner, dict) or (dataclasses.is_dataclass(inner) and isinstance(inner, type)):
                found |= sections(inner, key)
    return found


def shown(value: object) -> str | float:
    """A default as a page writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return float(value)
    return value if isinstance(value, str) else ""


def number_or_text(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize(
    ("page", "cls"),
    [
        ("llamacpp.md", LlamaCppOptions),
        ("openvino.md", OpenVinoOptions),
        ("ollama.md", OllamaOptions),
        ("openai.md", OpenAIOptions),
    ],
)
def test_page_has_every_option_with_its_default(page: str, cls: type[Any]) -> None:
    there = pages_options(page)
    wanted = sections(cls)
    assert set(there) == set(wanted)
    for name, section in wanted.items():
        fields = {key: shown(option.default) for key, option in section.items() if name or key not in wanted}
        if "version" in fields and name == "":
            fields["version"] = there[name].get("version", "it is missing")  # the pinned one, in words
        assert {key: number_or_text(value) for key, value in there[name].items()} == fields, (
            f"{page}, {name or 'engine'}"
        )
