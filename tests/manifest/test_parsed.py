"""A manifest's content as the build of a plugin keeps it, which a start reads without a YAML parser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from engine_plugin.errors import ManifestError
from engine_plugin.manifest import load_manifest, write_parsed
from engine_plugin.manifest.document import read_document

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parsed(tmp_path: Path) -> Path:
    return tmp_path / "parsed.json"


@pytest.mark.parametrize("path", [ROOT / "plugin.yaml", *ROOT.glob("plugins/*/plugin.yaml")], ids=str)
def test_parsed_manifest_is_the_same_manifest(path: Path, parsed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lines and the original numbers, which errors show, and without a YAML parser."""
    write_parsed(path, parsed)
    by_yaml = read_document(path)
    monkeypatch.setattr(yaml, "parse", None)
    assert read_document(path, parsed) == by_yaml
    assert load_manifest(path, parsed=parsed).services


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"data": {}, "places": [1]}', b"\xff", b"[" * 100_000]
)
def test_damaged_parsed_manifest_is_not_used(write: Callable[..., Path], parsed: Path, content: bytes) -> None:
    path = write("a: 1\n")
    assert read_document(path, parsed) == read_document(path)
    parsed.write_bytes(content)
    assert read_document(path, parsed) == read_document(path)


def test_manifest_with_problems_is_not_written_parsed(write: Callable[..., Path], parsed: Path) -> None:
    with pytest.raises(ManifestError, match="duplicate key"):
        write_parsed(write("a: 1\na: 2\n"), parsed)
    assert not parsed.exists()
