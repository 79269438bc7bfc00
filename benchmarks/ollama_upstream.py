"""A stand-in for Ollama: the same HTTP and the same lines of JSON, without a model behind them.

    python -m benchmarks.ollama_upstream [HOST:PORT]

listens there, or on a free port of 127.0.0.1, prints its address as JSON, and ends when its stdin does. Like
`upstream`, it takes no processor time to speak of.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from functools import cache
from typing import Any

from benchmarks.upstream import LAST_CHUNK, Connection, Wanted, chunk, serve, stream_head

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
}
_VECTOR = [0.0123456789] * 384
_LAST = _line("", done=True, done_reason="length", **_COUNTS)


@cache
def _embeddings(texts: int) -> bytes:
    return _encoded({"model": EMBEDDER, "embeddings": [_VECTOR] * texts, **_COUNTS})


class _Ollama(Connection):
    head = stream_head("application/x-ndjson")
    end = chunk(_LAST + b"\n") + LAST_CHUNK

    def answer(self, path: str, request: dict[str, Any], /) -> None:
        if path == "/api/embed":
            texts = request["input"]
            self.whole(_embeddings(1 if isinstance(texts, str) else len(texts)))
        elif path == "/api/embeddings":  # the older way, which takes one text
            if isinstance(request["prompt"], str):
                self.whole(_encoded({"embedding": _VECTOR}))
            else:
                self.whole(_encoded({"error": "prompt must be a string"}), status=400)
        elif path != "/api/chat":
            self.whole(_ANSWERS[path])
        elif request.get("stream") is False or not request["messages"]:
            wanted = Wanted.by(request)
            self.whole(_line("x" * (wanted.tokens * wanted.length), done=True, done_reason="length", **_COUNTS))
        else:
            self.begin(Wanted.by(request), self.end)

    @staticmethod
    def token(text: str, /) -> bytes:
        return chunk(_line(text) + b"\n")


def main() -> None:
    """Serve until stdin ends."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    host, _, port = (sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:0").rpartition(":")
    try:
        asyncio.run(serve(_Ollama, host, int(port), lambda port: print(json.dumps(f"{host}:{port}"), flush=True)))
    except OSError as error:
        sys.exit(f"benchmarks: {host}:{port}, where the other plugin expects its engine: {error.strerror}")


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # there is nothing to tidy up


if __name__ == "__main__":
    main()
