"""GGUF files: their headers, read within bounds, and models in several parts, joined to one file.

ggml's docs/gguf.md defines the format. Every count and length is checked against the rest of the file, so that
reading takes little memory and time for any file. Arrays are skipped.

A model in parts is a set of files `NAME-00001-of-00003.gguf`, as llama.cpp's `llama-gguf-split` writes them: the
first has the metadata, each has some of the tensors, `split.no` (from 0) and `split.count`.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from engine_plugin.system.files import LFS_POINTER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["GgufError", "Header", "Joined", "Tensor", "join", "part_names", "read_header", "whole_name"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_ALIGNMENT = 32
_MOST_DIMENSIONS = 8
_MOST_ELEMENTS = 1 << 50
_DEEPEST_ARRAY = 4
_LONGEST_NAME = 65535
_LONGEST_TEXT = 1024 * 1024
"""Bytes of a string that are kept; chat templates are far shorter."""
_MOST_STEPS = 8_000_000
"""Fields, tensors and strings in arrays; the largest vocabularies have some hundred thousand strings."""
_MOST_PARTS = 999
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.gguf)?", re.IGNORECASE)
_SPLIT = "split."


class GgufError(ValueError):
    """Not a valid GGUF file. The text says what is wrong, and where."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in the header. `kind` is ggml's number of its type, `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a file before its data. `values` has the scalars and strings; `fields` the key, first byte and end
    of each field; `order` is the byte order as in struct; `data` is the offset of the tensors' data."""

    order: str
    version: int
    values: dict[str, Any]
    fields: tuple[tuple[str, int, int], ...]
    tensors: tuple[Tensor, ...]
    alignment: int
    data: int
    size: int

    def number(self, key: str) -> int:
        """An integer among the values, 0 without one."""
        value = self.values.get(key)
        return value if type(value) is int else 0

    @property
    def parts(self) -> int:
        """The number of parts of the model, 0 or 1 for a single file."""
        return self.number("split.count")


def _part(name: str) -> re.Match[str] | None:
    """The parts of the name of a file that is one of several."""
    found = _PART.fullmatch(name)
    return found if found and 1 <= int(found["number"]) <= int(found["count"]) > 1 else None


def whole_name(name: str) -> str:
    """The file name of the joined model for the name of a part; "" for another name."""
    found = _part(name)
    return f"{found['stem']}{found['suffix'] or ''}" if found else ""


def part_names(name: str) -> tuple[str, ...]:
    """The names of all parts for the name of one; () for another name. Raises GgufError."""
    found = _part(name)
    if found is None:
        return ()
    count, end = int(found["count"]), found["suffix"] or ""
    if count > _MOST_PARTS:
        raise GgufError(f"{name}: {count} parts exceed the limit of {_MOST_PARTS}")
    return tuple(f"{found['stem']}-{number:05}-of-{count:05}{end}" for number in range(1, count + 1))


def read_header(path: Path) -> Header:
    """Read the header of a file. Blocks for up to a second. Raises GgufError and OSError."""
    with path.open("rb") as file:
        return _Reader(file, os.fstat(file.fileno()).st_size).header()


class _Reader:
    """Reads one file from its beginning."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._at = 0
        self._order = "<"
        self._steps = 0

    def header(self) -> Header:
        version = self._begin()
        tensor_count, field_count = self._unpack("QQ", "the counts")
        self._require(field_count, 13, "fields")
        self._require(tensor_count, 24, "tensors")
        values: dict[str, Any] = {}
        fields = []
        for _ in range(field_count):
            start = self._at
            key = self._text("a key", _LONGEST_NAME)
            (kind,) = self._unpack("I", key)
            value = self._value(kind, key, 0)
            if value is not None:
                values[key] = value
            fields.append((key, start, self._at))
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        alignment = values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            self._fail("general.alignment is not a power of two")
        data = _aligned(self._at, alignment)
        if any(tensor.offset > max(self._size - data, 0) for tensor in tensors):
            self._fail("the data of a tensor begins behind the end: the file is truncated")
        return Header(self._order, version, values, tuple(fields), tensors, alignment, data, self._size)

    def _begin(self) -> int:
        magic = self._file.read(len(LFS_POINTER))
        if magic == LFS_POINTER:
            raise GgufError(
                "this is a Git LFS pointer, not the file: run `git lfs pull` where it was cloned, or download it"
            )
        if magic[:4] != _MAGIC:
            raise GgufError(f"it begins with {magic[:4]!r}, not with {_MAGIC!r}")
        self._file.seek(4)
        self._at = 4
        (version,) = self._unpack("I", "the version")
        if version & 0xFFFF == 0:  # the other byte order
            self._order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            self._fail(f"version {version} is not one of {', '.join(map(str, _VERSIONS))}")
        return int(version)

    def _tensor(self) -> Tensor:
        self._step()
        name = self._text("a tensor's name", _LONGEST_NAME)
        (dimensions,) = self._unpack("I", name)
        if dimensions > _MOST_DIMENSIONS:
            self._fail(f"tensor {name[:64]!r} has {dimensions} dimensions")
        *shape, kind, offset = self._unpack(f"{dimensions}QIQ", name)
        tensor = Tensor(name, tuple(shape), kind, offset)
        if tensor.elements > _MOST_ELEMENTS:
            self._fail(f"tensor {name[:64]!r} has {tensor.elements} elements")
        return tensor

    def _value(self, kind: int, key: str, depth: int) -> Any:
        """A scalar or a string; None for an array, which is skipped."""
        self._step()
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind], key)[0]
        if kind == _STRING:
            return self._text(key)
        if kind != _ARRAY or depth == _DEEPEST_ARRAY:
            self._fail(f"{key[:64]!r} has a value of type {kind} at depth {depth}")
        inner, count = self._unpack("IQ", key)
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"), key)
            return None
        self._require(count, 8 if inner == _STRING else 12, key)
        for _ in range(count):
            if inner == _STRING:
                self._step()
                self._skip(self._unpack("Q", key)[0], key)
            else:
                self._value(inner, key, depth + 1)
        return None

    def _text(self, what: str, longest: int = 0) -> str:
        (length,) = self._unpack("Q", what)
        if longest and length > longest:
            self._fail(f"{what} has {length} bytes")
        text = self._read(min(length, _LONGEST_TEXT), what)
        self._skip(length - len(text), what)
        return text.decode("utf-8", "replace")

    def _unpack(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(self._order + form, self._read(struct.calcsize("<" + form), what))

    def _read(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            self._truncated(what)
        data = self._file.read(count)
        if len(data) < count:
            self._truncated(what)
        self._at += count
        return data

    def _skip(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            self._truncated(what)
        self._file.seek(count, os.SEEK_CUR)
        self._at += count

    def _require(self, count: int, least: int, what: str) -> None:
        """Fail unless `count` entries of `least` bytes each fit into the rest of the file."""
        if count * least > self._size - self._at:
            self._fail(f"it claims {count} {what[:64]}, for which it is too short")

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            self._fail(f"it has more than {_MOST_STEPS} entries")

    def _truncated(self, what: str) -> NoReturn:
        self._fail(f"it ends inside {what[:64]!r}: the file is truncated or damaged")

    def _fail(self, why: str) -> NoReturn:
        raise GgufError(f"{why} (at byte {self._at} of {self._size})")


@dataclass(frozen=True, slots=True)
class Joined:
    """The plan of a joined file: `head`, then for each part zeros and its data.

    `gaps` are the zeros before the data of each part, `starts` its offset in the part, `size` the bytes of the file.
    """

    head: bytes
    gaps: tuple[int, ...]
    starts: tuple[int, ...]
    size: int


def join(paths: Sequence[Path]) -> Joined:
    """Plan the file into which these parts are joined, in order. Blocks. Raises GgufError and OSError."""
    headers = []
    for number, path in enumerate(paths):
        try:
            header = read_header(path)
        except GgufError as error:
            raise GgufError(f"{path.name}: {error}") from None
        if (header.number("split.no"), header.parts) != (number, len(paths)):
            raise GgufError(
                f"{path.name}: its header says part {header.number('split.no') + 1} of {max(header.parts, 1)}, "
                f"not {number + 1} of {len(paths)}"
            )
        headers.append(header)
    first = headers[0]
    tensors, gaps, end = [], [], 0
    for path, header in zip(paths, headers, strict=True):
        base = _aligned(end, first.alignment)
        moved = [(tensor, base + tensor.offset) for tensor in header.tensors]
        if header.order != first.order or any(offset % first.alignment for _, offset in moved):
            raise GgufError(f"{path.name}: its byte order or alignment differs from that of {paths[0].name}")
        tensors += moved
        gaps.append(base - end)
        end = base + max(header.size - header.data, 0)
    head = _head(paths[0], first, tensors)
    gaps[0] = _aligned(len(head), first.alignment) - len(head)
    starts = tuple(min(header.data, header.size) for header in headers)
    return Joined(head, tuple(gaps), starts, len(head) + gaps[0] + end)


def _head(path: Path, first: Header, tensors: Sequence[tuple[Tensor, int]]) -> bytes:
    """The header of the joined file: the fields of the first part without those about parts, and all tensors."""
    order = first.order
    kept = [(start, end) for key, start, end in first.fields if not key.startswith(_SPLIT)]
    head = bytearray(_MAGIC + struct.pack(f"{order}IQQ", first.version, len(tensors), len(kept)))
    with path.open("rb") as file:
        for start, end in kept:
            file.seek(start)
            field = file.read(end - start)
            if len(field) < end - start:
                raise GgufError(f"{path.name}: changed while it was read")
            head += field
    for tensor, offset in tensors:
        name = tensor.name.encode("utf-8", "replace")
        form = f"{order}Q{len(name)}sI{len(tensor.shape)}QIQ"
        head += struct.pack(form, len(name), name, len(tensor.shape), *tensor.shape, tensor.kind, offset)
    return bytes(head)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
