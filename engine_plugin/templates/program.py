"""Renders one model's chat templates. Spawned by `renderer` as `python -m engine_plugin.templates.program`.

Frames on stdin and stdout are a big-endian length of four bytes and that many bytes of JSON. The first is
`[sources, tokens]`, answered by `{}`, or by `{"missing": …}` for a missing Python package. Each other one is a
conversation, `[messages, tools, extra, told]`, answered by `{"prompt": …}`, empty unless `told`, or by
`{"kind": …, "error": …}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from engine_plugin.process import guard
from engine_plugin.process.entry import bound_memory, own_stdin, read_exactly
from engine_plugin.templates.jinja import LIMIT, ChatTemplate, TemplateError, Templates

__all__ = ["MEMORY", "answer", "encode", "main"]

MEMORY = 512 << 20
"""Bytes of address space for rendering (Linux). A prompt of a million tokens is some megabytes."""
_LAST_RESORT = 60  # seconds; the parent, if alive, kills this process much earlier


def encode(shape: Any) -> bytes:
    """A frame."""
    body = json.dumps(shape, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return len(body).to_bytes(4, "big") + body


def main() -> None:
    """Answer frames until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the plugin
    guard.arm()
    stdin, out = own_stdin(), os.dup(1)
    os.dup2(2, 1)
    template = ChatTemplate(Templates(*_receive(stdin)))
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        _send(out, {"missing": error.name or "jinja2"})
        return
    bound_memory(MEMORY)
    _send(out, {})
    while True:
        conversation = _receive(stdin)
        if sys.platform != "win32":
            signal.alarm(_LAST_RESORT)
        _send(out, answer(template, *conversation))


def answer(
    template: ChatTemplate, messages: list[Any], tools: list[Any], extra: dict[str, Any], told: bool
) -> dict[str, Any]:
    """The answer to a conversation."""
    try:
        prompt = template.render(messages, tools, extra)
        return {"prompt": prompt if told else ""}
    except TemplateError as error:
        return {"kind": error.kind, "error": str(error)}


def _send(descriptor: int, shape: dict[str, Any]) -> None:
    try:
        data = memoryview(encode(shape))
    except (MemoryError, RecursionError):
        data = memoryview(encode({"kind": LIMIT, "error": "takes too much memory"}))
    while data:
        data = data[os.write(descriptor, data) :]


def _receive(descriptor: int) -> list[Any]:
    try:
        data = read_exactly(descriptor, int.from_bytes(read_exactly(descriptor, 4), "big"))
    except EOFError:  # the plugin has closed the pipe
        os._exit(0)
    frame: list[Any] = json.loads(data.decode("utf-8", "surrogatepass"))
    return frame


if __name__ == "__main__":
    main()
    os._exit(0)
