"""JSON files of models and of the package are read within bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin import jsontext
from engine_plugin.jsontext import JsonError
from engine_plugin.system.files import LARGEST_JSON, load_json, read_json

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.promise("X8")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[" + b"[]," * 30_000 + b"1]", "more than 20000 values"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested more than 100 deep"),
        (b'"' + b"x" * LARGEST_JSON + b'"', "limit is 16 MiB"),
        (b"9" * 5000, "not JSON"),
        (b"", "not JSON"),
    ],
    ids=["values", "depth", "bytes", "digits", "empty"],
)
def test_file_that_exceeds_a_bound_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, why: str
) -> None:
    monkeypatch.setattr(jsontext, "MOST_VALUES", 20_000)
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(JsonError, match=why):
        load_json(path)
    assert read_json(path) is None


def test_large_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(b'{"chat_template": "' + b"[" * (15 << 20) + b'"}')
    assert len((read_json(path) or {})["chat_template"]) == 15 << 20
