"""A server in this process with the API of the real one, which transcribes `tests.speech.sounds.spoken`."""

from __future__ import annotations

import asyncio
import math
import os
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.openvino.client import ServerClient
from engine_plugin.engines.openvino.requests import API
from engine_plugin.speech.decoder import Decoder
from engine_plugin.speech.pcm import native_samples
from engine_plugin.speech.services import SpeechServices
from engine_plugin.transport.http1 import Http1Client
from tests.speech.sounds import Listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from engine_plugin.messages import ConversationMessage
    from engine_plugin.transport.posting import PostingClient

aiohttp = pytest.importorskip("aiohttp")
web = pytest.importorskip("aiohttp.web")

SPOKEN_RATE = 24_000


class Server:
    """The requests that the server got, and the answers that it gives."""

    def __init__(self) -> None:
        self.port = 0
        self.forms: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.samples: list[bytes] = []
        self.bodies: list[dict[str, Any]] = []
        self.answer: Any = None
        """Replaces the transcription."""
        self.refusal: tuple[int, str] | None = None
        self.wav: bytes | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.listener = Listener()

    async def transcription(self, request: Any) -> Any:
        fields: dict[str, str] = {}
        async for part in await request.multipart():
            if part.name == "file":
                samples = native_samples(bytes(await part.read()))
                assert samples is not None, "16 kHz mono s16le"
                self.samples.append(samples)
            else:
                fields[part.name] = await part.text()
        self.forms.append(fields)
        self.paths.append(request.path)
        await self._pass_gate()
        if self.refusal:
            return self._refuse()
        if self.answer is not None:
            return web.json_response(self.answer)
        segments = self.listener.hear(self.samples[-1])
        shapes = [segment.to_json(number) for number, segment in enumerate(segments)]
        text = "".join(segment.text for segment in segments).strip()
        return web.json_response({"text": text, "language": "en", "segments": shapes})

    async def speech(self, request: Any) -> Any:
        self.bodies.append(await request.json())
        await self._pass_gate()
        if self.refusal:
            return self._refuse()
        return web.Response(body=float_wav(0.5) if self.wav is None else self.wav, content_type="audio/wav")

    async def _pass_gate(self) -> None:
        self.asked.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def _refuse(self) -> Any:
        assert self.refusal is not None
        status, message = self.refusal
        return web.json_response({"error": {"message": message, "type": "x", "code": status}}, status=status)


def float_wav(seconds: float) -> bytes:
    """A tone as the engine generates it: 24 kHz, 32-bit floats."""
    count = round(seconds * SPOKEN_RATE)
    values = [0.5 * math.sin(2 * math.pi * 300 * n / SPOKEN_RATE) for n in range(count)]
    layout = struct.pack("<HHIIHH", 3, 1, SPOKEN_RATE, 4 * SPOKEN_RATE, 4, 32)
    data = struct.pack(f"<{count}f", *values)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + layout
    return head + b"data" + struct.pack("<I", len(data)) + data


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server on loopback."""
    server = Server()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v3/audio/transcriptions", server.transcription)
    app.router.add_post("/v3/audio/translations", server.transcription)
    app.router.add_post("/v3/audio/speech", server.speech)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        yield server
    finally:
        server.gate.set()
        await runner.cleanup()


@pytest.fixture
async def speech(server: Server, tmp_path: Path) -> AsyncIterator[Speech]:
    """The speech services on that server."""
    async with speech_on(Http1Client(("127.0.0.1", server.port)), tmp_path / "output") as made:
        yield made


class Speech:
    """The speech services on the server of one client."""

    def __init__(self, client: PostingClient, output: Path, site: Path | None = None, **changes: Any) -> None:
        self._client = client
        self._services = SpeechServices(API, Decoder(site, os.environ), output, **changes)

    async def transcribe(self, model: str, request: dict[str, Any]) -> bytes:
        return await self._services.transcribe(self._client, model, request)

    async def speak(self, model: str, request: dict[str, Any]) -> bytes:
        return await self._services.speak(self._client, model, request)

    def converse(
        self,
        use: Callable[[str], AbstractAsyncContextManager[str]],
        default_model: str,
        messages: AsyncIterator[ConversationMessage],
    ) -> AbstractAsyncContextManager[AsyncIterator[ConversationMessage]]:
        @asynccontextmanager
        async def with_client(name: str) -> AsyncIterator[tuple[PostingClient, str]]:
            async with use(name) as served:
                yield self._client, served

        return self._services.converse(with_client, default_model, messages)


@asynccontextmanager
async def speech_on(http: Http1Client, output: Path, **changes: Any) -> AsyncIterator[Speech]:
    try:
        yield Speech(ServerClient(http, None), output, **changes)
    finally:
        http.close()
