"""What the tests here share: calls of an engine, and sound."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import wave
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_plugin

if TYPE_CHECKING:
    from engine_plugin.engines.openvino.engine import OpenVinoEngine

__all__ = ["HELLO", "LIMIT", "SAMPLES", "call", "tone"]

LIMIT = 60.0
SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "openvino"
HELLO = {"model": "tiny-chat", "messages": [{"role": "user", "content": "count"}]}


def tone(seconds: float = 1.0) -> bytes:
    """A WAV of 16 kHz mono."""
    samples = [int(8000 * math.sin(number / 8)) for number in range(int(16_000 * seconds))]
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return sound.getvalue()


async def call(engine: OpenVinoEngine, service: str, **request: Any) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT):
        shape: dict[str, Any] = json.loads(await engine.call(service, request))
    return shape
