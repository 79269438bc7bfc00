"""Work for a hosted plugin: calls of all kinds at once."""

from __future__ import annotations

import asyncio
import io
import math
import struct
import wave
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_plugin
from engine_plugin.host import events
from tests.engines.openvino.driver.running import tone
from tests.models.hub import REPOSITORY as FAR_MODEL
from tests.models.hub import HubServer, hub_server
from tests.models.server import Script
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from engine_plugin.host import PluginClient

__all__ = ["CHAT", "LONG_PICTURE", "LONG_TEXT", "MODELS", "busy", "draw", "recording", "stalled_hub", "talk", "write"]

MODELS = ("tiny-chat", "tiny-image", "tiny-transcribe")
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "count"}]}
LONG_TEXT: dict[str, Any] = {"prompt": ["count"] * 64, "max_tokens": 1000, "ignore_eos": True}
"""For generate; seconds of work."""

LONG_PICTURE: dict[str, Any] = {"prompt": "a", "size": "256x256", "num_inference_steps": 100, "n": 10}
"""Ten seconds of work and more, with progress for each step."""

_A_NUMBER = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
_SAMPLE = Path(engine_plugin.__file__).parent / "samples" / "openvino" / "tiny-embed"


async def write(plugin: PluginClient, begun: asyncio.Event, request: Mapping[str, Any] = LONG_TEXT) -> None:
    """Stream texts to their end."""
    async with plugin.stream("generate", request) as chunks:
        async for _ in chunks:
            begun.set()


async def draw(plugin: PluginClient, begun: asyncio.Event, request: Mapping[str, Any] = LONG_PICTURE) -> None:
    """Stream pictures to their end."""
    async with plugin.stream("text-to-image", request) as chunks:
        async for _ in events(chunks):
            begun.set()


async def talk(plugin: PluginClient, begun: asyncio.Event) -> None:
    """Speak, in a format that needs the decoder, until the conversation breaks."""
    async with plugin.invoke_bidi("speech-to-text-ws") as conversation:
        speaking = asyncio.create_task(_speak(conversation))
        try:
            async for _ in conversation:
                begun.set()
        finally:
            speaking.cancel()
            await asyncio.gather(speaking, return_exceptions=True)


async def _speak(conversation: Any) -> None:
    await conversation.send(recording(2, rate=44_100), metadata={"format": "wav"})
    samples = recording(1, rate=44_100)[44:]
    while True:
        await conversation.send(samples)
        await asyncio.sleep(0.2)


def recording(seconds: int, rate: int) -> bytes:
    """A WAV, mono. Any other rate than 16 kHz needs the decoder."""
    second = struct.pack(f"<{rate}h", *(int(8000 * math.sin(number / 8)) for number in range(rate)))
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(second * seconds)
    return sound.getvalue()


async def _write_on(plugin: PluginClient, begun: asyncio.Event) -> None:
    while True:
        await write(plugin, begun)


async def _pull(plugin: PluginClient) -> None:
    async with aclosing(plugin.pull_model_stream(f"hf:{FAR_MODEL}")) as steps:
        async for _ in steps:
            pass


@asynccontextmanager
async def stalled_hub() -> AsyncIterator[HubServer]:
    """A hub whose model never comes whole."""
    async with hub_server() as hub:
        hub.tree = {path.name: path.read_bytes() for path in _SAMPLE.iterdir()}
        hub.troubles["openvino_model.bin"].append(Script(stall_after=1000))
        yield hub


@asynccontextmanager
async def busy(plugin: PluginClient, hub: HubServer) -> AsyncIterator[dict[str, asyncio.Task[Any]]]:
    """Running calls of all kinds; their results are ignored.

    Texts and pictures are streamed, a recording is transcribed, a live stream runs, and a model is pulled.
    """
    await asyncio.gather(*(plugin.load_model(name) for name in MODELS))
    await plugin.invoke("chat", {**CHAT, "max_tokens": 4, "response_format": _A_NUMBER})  # its helper stays
    begun = {name: asyncio.Event() for name in ("text", "picture", "talk")}
    calls: dict[str, asyncio.Task[Any]] = {
        "text": asyncio.create_task(_write_on(plugin, begun["text"])),
        "picture": asyncio.create_task(draw(plugin, begun["picture"])),
        "talk": asyncio.create_task(talk(plugin, begun["talk"])),
        "recording": asyncio.create_task(plugin.invoke("speech-to-text", {"audio": tone(300)})),
        "pull": asyncio.create_task(_pull(plugin)),
    }
    try:
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(hub.asked.wait(), *(event.wait() for event in begun.values()))
        yield calls
    finally:
        for call in calls.values():
            call.cancel()
        await asyncio.gather(*calls.values(), return_exceptions=True)
