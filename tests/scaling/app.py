"""A small cluster on this machine: Ray Serve with an OpenAI-compatible app of two replicas. Run by Ray's own Python.

    python app.py --port 8000 --replicas 2

Serves on 127.0.0.1 until its standard input ends, and says `ready` before. One deployment speaks HTTP and knows no
model, another has the models, one request at a time, as a replica that fills its accelerator would have. The answer
to a chat is the last message's words over and over, `max_tokens` of them; `system_fingerprint` names the replica.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MODEL = "echo"
_PAUSE = 0.005
"""Seconds that a word takes."""


class Echo:
    """A replica. `asked` is the JSON of a chat."""

    def __init__(self) -> None:
        serve = import_module("ray.serve")
        self._name = str(serve.get_replica_context().replica_id.unique_id)

    async def chat(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        words = str(asked["messages"][-1]["content"]).split() or ["nothing"]
        wanted = int(asked.get("max_tokens") or 16)
        for number in range(wanted):
            await asyncio.sleep(_PAUSE)
            last = number + 1 == wanted
            yield {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": MODEL,
                "system_fingerprint": self._name,
                "choices": [
                    {
                        "index": 0,
                        "delta": {"content": f"{words[number % len(words)]} "},
                        "finish_reason": "length" if last else None,
                    }
                ],
            }


class Front:
    """The HTTP side."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def __call__(self, request: Any) -> Any:
        responses = import_module("starlette.responses")
        if request.method == "GET" and request.url.path == "/v1/models":
            listed = {"id": MODEL, "object": "model", "created": 1, "owned_by": "cluster"}
            return responses.JSONResponse({"object": "list", "data": [listed]})
        if request.method != "POST" or request.url.path != "/v1/chat/completions":
            return responses.JSONResponse({"error": {"message": "Not Found"}}, status_code=404)
        asked = await request.json()
        chunks = self._chunks(asked)
        if asked.get("stream"):
            return responses.StreamingResponse(_events(chunks), media_type="text/event-stream")
        return responses.JSONResponse(_whole([chunk async for chunk in chunks]))

    async def _chunks(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        answer = self._replicas.options(stream=True).chat.remote(asked)
        try:
            async for chunk in answer:
                yield chunk
        finally:
            answer.cancel()


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        yield f"data: {json.dumps(chunk)}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _whole(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    usage = {"prompt_tokens": 1, "completion_tokens": len(chunks), "total_tokens": 1 + len(chunks)}
    return {**chunks[-1], "object": "chat.completion", "choices": [choice], "usage": usage}


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=2)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray, serve = import_module("ray"), import_module("ray.serve")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": options.port})
            echo = serve.deployment(
                num_replicas=options.replicas, max_ongoing_requests=1, ray_actor_options={"num_cpus": 0}
            )(Echo)
            front = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(Front)
            serve.run(front.bind(echo.bind()), route_prefix="/")
            print("ready", flush=True)
            sys.stdin.read()
            serve.shutdown()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
