"""A stand-in for Ollama: the same HTTP and the same lines of JSON, without a model behind them.

    python -m benchmarks.ollama_upstream

listens on a free port of 127.0.0.1, prints its address as JSON, and ends when its stdin does.
Like `upstream`, it takes no processor time to speak of: a line is made once. `options.num_predict` says how many
tokens come, and the last message at what pace. The tokens of a paced stream are `sent N`, with the monotonic clock in
nanoseconds when they left: what is in texts gets through every translation.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

from benchmarks.upstream import LAST_CHUNK, Connection, chunk, pace, serve, stream_head

__all__ = ["EMBEDDER", "MODEL", "main"]

MODEL, EMBEDDER = "stand-in:latest", "stand-in-embed:latest"

_CREATED = "2026-11-21T10:46:49.782701123Z"
_COUNTS = {
    "total_duration": 174560334,
    "load_duration": 101397084,
    "prompt_eval_count": 26,
    "prompt_eval_duration": 13074791,
    "eval_count": 18,
    "eval_duration": 52479709,
}


def _encoded(shape: dict[str, Any]) -> bytes:
    return json.dumps(shape, separators=(",", ":")).encode()


def _line(content: str, **more: Any) -> bytes:
    shape = {"model": MODEL, "created_at": _CREATED, "message": {"role": "assistant", "content": content}}
    return _encoded({**shape, "done": False, **more})


def _model(name: str, capability: str) -> dict[str, Any]:
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "135M",
        "quantization_level": "Q4_0",
        "context_length": 8192,
    }
    return {
        "name": name,
        "model": name,
        "modified_at": _CREATED,
        "size": 91_000_000,
        "digest": f"{len(name):064x}",
        "details": details,
        "capabilities": [capability],
    }


_TAGS = {"models": [_model(MODEL, "completion"), _model(EMBEDDER, "embedding")]}
_ANSWERS = {
    "/": b"Ollama is running",
    "/api/version": _encoded({"version": "0.33.1"}),
    "/api/tags": _encoded(_TAGS),
    "/api/ps": _encoded({"models": []}),
    "/api/embed": _encoded({"model": EMBEDDER, "embeddings": [[0.0123456789] * 384], **_COUNTS}),
}
_LAST = _line("", done=True, done_reason="length", **_COUNTS)


class _Ollama(Connection):
    head = stream_head("application/x-ndjson")
    token = chunk(_line(" token") + b"\n")
    end = chunk(_LAST + b"\n") + LAST_CHUNK

    def answer(self, path: str, request: dict[str, Any], /) -> None:
        if path != "/api/chat":
            self.whole(_ANSWERS[path])
        elif request.get("stream") is False or not request["messages"]:
            self.whole(_LAST)
        else:
            self.begin(int(request["options"]["num_predict"]), self.end, *pace(request))

    def stamped(self) -> bytes:
        return chunk(_line(f"sent {time.monotonic_ns()}") + b"\n")


def main() -> None:
    """Serve until stdin ends."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    asyncio.run(serve(_Ollama, "127.0.0.1", 0, lambda port: print(json.dumps(f"127.0.0.1:{port}"), flush=True)))


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # there is nothing to tidy up


if __name__ == "__main__":
    main()
