"""docs/models.md has the families, the estimates and the capabilities of the code."""

from __future__ import annotations

from pathlib import Path

from engine_plugin.models.families import ESTIMATES, FAMILIES, LEAST
from engine_plugin.models.info import FEATURES

PAGE = (Path(__file__).parents[3] / "docs/models.md").read_text(encoding="utf-8")


def test_every_family_is_on_the_page() -> None:
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for line in PAGE.partition("| family |")[2].splitlines()[2:]:
        names, context, features = (cell.strip() for cell in line.strip("|").split("|"))
        for name in names.split(", "):
            found[name] = (int(context), tuple(features.split(", ")) if features else ())
    assert found == {name: (family.context_length, family.features) for name, family in FAMILIES.items()}


def test_every_estimate_is_on_the_page() -> None:
    text = " ".join(PAGE.split())
    for least, context in ESTIMATES:
        assert f"from {least / 1e9:g} billion on {context}" in text or f"from {least / 1e9:g} on {context}" in text
    assert f"below that {LEAST}" in text


def test_every_capability_is_explained() -> None:
    table = PAGE.partition("| capability |")[2].partition("\n\n")[0]
    assert [feature for feature in FEATURES if f"`{feature}`" not in table] == []
