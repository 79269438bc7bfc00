"""A fake of several kinds of servers, which answers like each of them and records its requests.

`kind` is one of the values of `engine.server`; "gateway" is an unidentified server that requires a key.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.speech.sounds import wav

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

__all__ = ["MODELS", "Contract", "free_pair"]

MODELS: dict[str, list[dict[str, Any]]] = {
    "vllm": [
        {"id": "qwen3-8b", "object": "model", "created": 1_700_000_000, "owned_by": "vllm", "max_model_len": 40960}
    ],
    "llama-server": [
        {
            "id": "m.gguf",
            "object": "model",
            "created": 1_700_000_000,
            "owned_by": "llamacpp",
            "meta": {"n_ctx_train": 131072, "n_params": 8_030_261_248, "size": 4_912_898_304},
        }
    ],
    "lmstudio": [
        {"id": "gemma-3", "object": "model", "owned_by": "organization_owner"},
        {"id": "nomic", "object": "model", "owned_by": "organization_owner"},
    ],
    "ovo": [{"id": "mlx-community/Qwen3-4B-4bit", "object": "model", "owned_by": "ovo"}],
    "ovms": [{"id": "tiny", "object": "model", "created": 1, "owned_by": "OVMS"}],
    "gateway": [
        {"id": "gpt-x", "object": "model", "owned_by": "us", "context_window": 64000},
        {"id": "text-embedding-x", "object": "model", "owned_by": "us"},
        {"id": "whisper-1", "object": "model", "owned_by": "us"},
        {"id": "tts-1", "object": "model", "owned_by": "us"},
    ],
}

_EXTRA: dict[str, dict[str, Any]] = {
    "vllm": {
        "/version": {"version": "0.11.0"},
        "/openapi.json": {"paths": {"/v1/models": {}, "/v1/chat/completions": {}, "/v1/completions": {}}},
    },
    "llama-server": {
        "/props": {
            "default_generation_settings": {"n_ctx": 8192},
            "chat_template": "{% if tools %}x{% endif %}<think>",
            "modalities": {"vision": True, "audio": False},
            "build_info": "b6700-abc",
        }
    },
    "lmstudio": {
        "/api/v0/models": {
            "data": [
                {
                    "id": "gemma-3",
                    "type": "vlm",
                    "arch": "gemma3",
                    "compatibility_type": "gguf",
                    "quantization": "Q4_K_M",
                    "state": "loaded",
                    "max_context_length": 131072,
                    "loaded_context_length": 4096,
                    "capabilities": ["tool_use"],
                },
                {"id": "nomic", "type": "embeddings", "state": "not-loaded", "max_context_length": 2048},
            ]
        }
    },
    "ovo": {"/healthz": {"status": "ok"}},
    "ovms": {"/v2": {"name": "OpenVINO Model Server", "version": "2026.1"}},
    "gateway": {},
}
_NATIVE = {"models": [{"repo_id": "mlx-community/Qwen3-4B-4bit", "size_bytes": 2_300_000_000}]}
_FASTAPI_404 = {"detail": "Not Found"}


class Contract:
    """The requests (`bodies`, `forms`, `heads`) and the answers."""

    def __init__(self, kind: str, key: str = "") -> None:
        self.kind = kind
        self.key = key
        self.root = "/v3" if kind == "ovms" else "/v1"
        self.prefix = ""
        self.models = [dict(entry) for entry in MODELS[kind]]
        self.lists_models = True
        self.paths: list[str] = []
        self.heads: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.forms: list[dict[str, str]] = []
        self.refusal: tuple[int, Any] | None = None
        self.refuses_details = False
        self.stream: bytes | None = None
        self.streams = True
        self.downloads = [
            {"status": "downloading", "downloaded_bytes": 10, "total_bytes": 40},
            {"status": "completed", "downloaded_bytes": 40, "total_bytes": 40},
        ]
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.port = 0
        self._runners: list[web.AppRunner] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        """Listen on loopback, for OVO also on the next port."""
        self.port = await self._listen(self._face, port, tls)
        if self.kind == "ovo":
            await self._listen(self._native, self.port + 1, None)

    async def _listen(
        self, answer: Callable[[web.Request], Awaitable[web.StreamResponse]], port: int, tls: ssl.SSLContext | None
    ) -> int:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        found: int = runner.addresses[0][1]
        return found

    async def stop(self) -> None:
        self.gate.set()
        for runner in self._runners:
            await runner.cleanup()
        self._runners = []

    async def _native(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/ovo/models":
            return web.json_response(_NATIVE)
        if request.path == "/ovo/models/download":
            self.bodies.append(await request.json())
            return web.json_response({"id": "d 1"}, status=202)
        if request.path == "/ovo/download/d 1":
            return web.json_response(self.downloads.pop(0) if len(self.downloads) > 1 else self.downloads[0])
        return web.json_response(_FASTAPI_404, status=404)

    async def _face(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "Incorrect API key provided", "type": "x"}}, status=401)
        path = request.path.removeprefix(self.prefix)
        if request.method == "GET":
            if path == f"{self.root}/models":
                self.heads.append(dict(request.headers))
                if not self.lists_models:
                    return web.json_response({"error": "out of order"}, status=500)
                return web.json_response({"object": "list", "data": self.models})
            found = _EXTRA[self.kind].get(path)
            return web.json_response(found) if found is not None else self._unknown(path)
        self.paths.append(path)
        self.heads.append(dict(request.headers))
        if path.startswith(f"{self.root}/audio/tra"):
            return await self._transcription(request)
        body = await request.json()
        self.bodies.append(body)
        await self._pass_gate(hears=self.kind != "llama-server" or body.get("stream") is True)
        if self.refusal is not None:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        answers = {"chat/completions": self._chat, "completions": self._completion, "audio/speech": self._speech}
        answer = answers.get(path.removeprefix(f"{self.root}/"))
        if answer is not None and not (path.endswith("speech") and self.kind != "gateway"):
            return await answer(request, body)
        shape = self._plain(path.removeprefix(f"{self.root}/"), body)
        return web.json_response(shape) if shape is not None else self._unknown(path)

    def _unknown(self, path: str) -> web.Response:
        if self.kind == "lmstudio":
            return web.json_response({"error": f"Unexpected endpoint or method. (POST {path})"})
        if self.kind == "llama-server":
            error = {"code": 404, "message": "File Not Found", "type": "not_found_error"}
            return web.json_response({"error": error}, status=404)
        return web.json_response(_FASTAPI_404, status=404)

    async def _pass_gate(self, *, hears: bool = True) -> None:
        """Wait. A disconnected caller is detected only if the kind of server detects it."""
        self.asked.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            if hears:
                self.cancelled.set()
            raise

    async def _chat(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream") and self.streams:
            return await self._events(request, [{"delta": {"content": word}} for word in ("one ", "two")])
        message: dict[str, Any] = {"role": "assistant", "content": "one two"}
        if body.get("tools"):
            call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        reason = "tool_calls" if body.get("tools") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        shape = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        return web.json_response({**shape, "usage": usage})

    async def _completion(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream") and self.streams:
            return await self._events(request, [{"text": word} for word in ("one ", "two")])
        choice = {"index": 0, "text": "one two", "finish_reason": "stop"}
        return web.json_response(
            {"id": "x", "object": "text_completion", "model": body["model"], "choices": [choice]}
        )

    async def _events(self, request: web.Request, pieces: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if self.stream is not None:
            await response.write(self.stream)
        else:
            for piece in pieces:
                event = {"object": "chunk", "choices": [{"index": 0, "finish_reason": None, **piece}]}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _speech(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=wav(bytes(3200)), content_type="audio/wav")

    def _plain(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if path == "embeddings" and self.kind != "vllm":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
            return {"object": "list", "data": data, "model": body["model"]}
        if path == "rerank" and self.kind in ("llama-server", "gateway"):
            scores = (0.0, 2.0, -2.0) if self.kind == "llama-server" else (0.5, 0.9, 0.1)
            results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
            return {"model": body["model"], "results": results}
        if path == "images/generations" and self.kind in ("ovms", "gateway"):
            return {"created": 1, "data": [{"b64_json": "AA=="}]}
        return None

    async def _transcription(self, request: web.Request) -> web.StreamResponse:
        fields: dict[str, str] = {}
        async for part in await request.multipart():
            fields[str(part.name)] = str(part.filename) if part.name == "file" else await part.text()  # type: ignore[union-attr]  # not nested
        self.forms.append(fields)
        await self._pass_gate()
        if self.refusal is not None:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        if self.kind != "gateway":
            return self._unknown(request.path)
        if fields.get("response_format") == "verbose_json":
            if self.refuses_details:
                words = "response_format 'verbose_json' is not compatible with model 'whisper-1'"
                return web.json_response({"error": {"message": words}}, status=400)
            segments = [{"id": 0, "start": 0.0, "end": 0.5, "text": "one"}]
            return web.json_response({"text": "one", "duration": 1.5, "language": "english", "segments": segments})
        return web.json_response({"text": "one"})


def free_pair() -> int:
    """A free port on loopback whose successor is free too."""
    import socket

    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
