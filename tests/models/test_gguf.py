"""Headers of GGUF files: whatever a file holds, reading it takes little time and memory."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.models import gguf
from engine_plugin.models.gguf import GgufError, join, part_names, read_header, whole_name
from tests.models.fakes import SAMPLES
from tests.models.splitting import TEXT, U32, field, split

if TYPE_CHECKING:
    from pathlib import Path

HUGE = 1 << 40


def head(fields: int = 1, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def array(kind: int, count: int) -> bytes:
    return field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", kind, count))


@pytest.mark.parametrize("name", ["tiny-chat", "tiny-embed", "tiny-rerank"])
def test_header_equals_that_of_the_gguf_library(name: str) -> None:
    library = pytest.importorskip("gguf")
    path = SAMPLES / f"{name}.gguf"
    header, reader = read_header(path), library.GGUFReader(path)
    assert [
        (tensor.name, tensor.elements, tensor.kind, header.data + tensor.offset) for tensor in header.tensors
    ] == [
        (tensor.name, int(tensor.n_elements), int(tensor.tensor_type), tensor.data_offset)
        for tensor in reader.tensors
    ]
    for key, value in header.values.items():
        assert reader.get_field(key).contents() == value


@pytest.mark.promise("X7")
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (head() + array(8, HUGE), "claims 1099511627776 tokenizer.ggml.tokens"),
        (head() + array(4, HUGE), "truncated"),
        (head() + array(9, HUGE), "claims"),
        (head() + array(4, 2**64 - 1), "truncated"),
        (head(fields=HUGE), "claims 1099511627776 fields"),
        (head(tensors=HUGE, fields=0), "claims 1099511627776 tensors"),
        (head() + struct.pack("<Q", HUGE), "a key has 1099511627776 bytes"),
        (head() + field("general.name", TEXT, struct.pack("<Q", HUGE)), "truncated"),
        (head() + field("x", 99, b""), "type 99"),
        (head() + field("x", 9, struct.pack("<IQ", 9, 1) * 20), "depth 4"),
        (head(0, 1) + text("t") + struct.pack("<I", 2**31) + bytes(64), "2147483648 dimensions"),
        (head(0, 1) + text("t") + struct.pack("<IQIQ", 1, 8, 0, HUGE), "truncated"),
        (head(0, 1) + text("t") + struct.pack("<I2QIQ", 2, HUGE, HUGE, 999, 0), "has 1208925819614629174706176 elem"),
        (head() + field("general.alignment", U32, struct.pack("<I", 0)), "power of two"),
        (head(version=1), "version 1"),
        (b"GGUF", "truncated"),
        (b"", "begins with"),
        (b"PK\x03\x04" + bytes(100), "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    ],
)
def test_impossible_headers_are_rejected_at_once(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data + (bytes(94 - len(data)) if data.startswith(b"GGUF") and 4 < len(data) < 94 else b""))
    tracemalloc.start()
    try:
        with pytest.raises(GgufError, match=why):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.promise("X7")
def test_the_entries_of_one_file_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_MOST_STEPS", 1000)
    path = tmp_path / "model.gguf"
    path.write_bytes(head() + array(8, 2000) + text("") * 2000)
    with pytest.raises(GgufError, match="more than 1000 entries"):
        read_header(path)


@pytest.mark.promise("X7")
@given(st.data())
def test_damaged_header_is_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    whole = bytearray((SAMPLES / "tiny-chat.gguf").read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with suppress(GgufError):
        read_header(path)


def test_names_of_parts() -> None:
    names = ("big-00001-of-00003.gguf", "big-00002-of-00003.gguf", "big-00003-of-00003.gguf")
    assert [part_names(name) for name in names] == [names] * 3
    assert {whole_name(name) for name in names} == {"big.gguf"}
    for name in (
        "big.gguf",
        "big-00001-of-00001.gguf",
        "big-00004-of-00003.gguf",
        "big-1-of-3.gguf",
        "big-00000-of-00002",
    ):
        assert (part_names(name), whole_name(name)) == ((), "")
    with pytest.raises(GgufError, match="99999 parts"):
        part_names("big-00001-of-99999.gguf")


@pytest.mark.promise("S8")
@pytest.mark.parametrize(("count", "empty_first"), [(2, False), (5, False), (3, True)])
def test_parts_join_to_the_whole_model(tmp_path: Path, count: int, empty_first: bool) -> None:
    original = SAMPLES / "tiny-chat.gguf"
    paths = split(original, tmp_path, count, empty_first=empty_first)
    plan = join(paths)
    data = plan.head
    for path, gap, start in zip(paths, plan.gaps, plan.starts, strict=True):
        data += bytes(gap) + path.read_bytes()[start:]
    assert len(data) == plan.size
    joined = tmp_path / "joined.gguf"
    joined.write_bytes(data)
    one, other = read_header(joined), read_header(original)
    assert one.values == other.values
    whole = original.read_bytes()
    for found, wanted in zip(one.tensors, other.tensors, strict=True):
        assert (found.name, found.shape, found.kind) == (wanted.name, wanted.shape, wanted.kind)
        content = whole[other.data + wanted.offset :][: 2 * wanted.elements]
        assert data[one.data + found.offset :][: len(content)].rstrip(b"\0") == content.rstrip(b"\0")
    assert len(data) < len(whole) + 32 * len(one.tensors) + 64


@pytest.mark.promise("S8")
def test_parts_of_different_models_are_not_joined(tmp_path: Path) -> None:
    paths = split(SAMPLES / "tiny-chat.gguf", tmp_path, 2)
    with pytest.raises(GgufError, match=r"00002-of-00002\.gguf: its header says part 2 of 2, not 1 of 2"):
        join(paths[::-1])
    paths[1].write_bytes((SAMPLES / "tiny-chat.gguf").read_bytes())
    with pytest.raises(GgufError, match="part 1 of 1, not 2 of 2"):
        join(paths)
