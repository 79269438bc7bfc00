"""A GGUF model in parts, as llama-gguf-split writes it: metadata in the first part, tensors spread over all."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

from engine_plugin.models.gguf import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.models.gguf import Tensor

__all__ = ["field", "split"]

U16, I32, U32, TEXT = 2, 5, 4, 8


def field(key: str, kind: int, value: bytes) -> bytes:
    """One field of a header."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def split(path: Path, folder: Path, count: int, stem: str = "big", *, empty_first: bool = False) -> list[Path]:
    """The parts, `folder/big-00001-of-0000N.gguf` and so on; `empty_first` leaves the first without tensors."""
    whole = path.read_bytes()
    header = read_header(path)
    tensors, spread = list(header.tensors), count - empty_first
    each = -(-len(tensors) // spread)
    groups = [tensors[number * each : (number + 1) * each] for number in range(spread)]
    if empty_first:
        groups.insert(0, [])
    ends = {tensor.name: following.offset for tensor, following in pairwise(tensors)}
    ends[tensors[-1].name] = header.size - header.data
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, group in enumerate(groups):
        fields = [whole[start:end] for _, start, end in header.fields] if number == 0 else []
        fields += [
            field("split.no", U16, struct.pack("<H", number)),
            field("split.count", U16, struct.pack("<H", count)),
            field("split.tensors.count", I32, struct.pack("<i", len(tensors))),
        ]
        paths.append(folder / f"{stem}-{number + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(_part(fields, group, whole, header.data, ends))
    return paths


def _part(fields: list[bytes], group: list[Tensor], whole: bytes, start: int, ends: dict[str, int]) -> bytes:
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(group), len(fields)) + b"".join(fields))
    data = bytearray()
    for tensor in group:
        name = tensor.name.encode()
        head += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.kind, len(data))
        data += whole[start + tensor.offset : start + ends[tensor.name]]
        data += bytes(-len(data) % 32)
    return bytes(head + bytes(-len(head) % 32) + data)
