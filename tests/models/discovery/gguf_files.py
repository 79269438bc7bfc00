"""GGUF files with little more than a header."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_header"]


def write_header(path: Path, architecture: str, context_length: int, template: str | None, tools: str = "") -> Path:
    """Write a file that can be inspected, not loaded. `tools` is the template for tools, if it differs."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context_length)
    if template is not None and tools:
        writer.add_chat_template([{"name": "default", "template": template}, {"name": "tool_use", "template": tools}])
    elif template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
