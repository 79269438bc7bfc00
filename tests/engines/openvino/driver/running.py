"""A plugin with its OpenVINO engine as the tests see them, and the processes behind them."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
import wave
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import psutil

from tests.engines.llamacpp.running import processes_of
from tests.patience import LIMIT, pace

if TYPE_CHECKING:
    from engine_plugin.engines.openvino.engine import OpenVinoEngine
    from engine_plugin.engines.openvino.server import OpenVinoServer
    from engine_plugin.host import PluginClient

__all__ = [
    "COUNT",
    "ENGINE_MARK",
    "FEW_TEXTS",
    "MUCH",
    "ONE_STEP",
    "PICTURE",
    "SERVICES",
    "TEXTS",
    "RunningEngine",
    "spent",
    "still",
    "tone",
]

ENGINE_MARK = "ENGINE_PLUGIN_TEST_OPENVINO"
SERVICES = {
    "chat": "tiny-chat",
    "generate": "tiny-chat",
    "embed": "tiny-embed",
    "rerank": "tiny-rerank",
    "text-to-image": "tiny-image",
    "speech-to-text": "tiny-transcribe",
    "speech-to-text-ws": "tiny-transcribe",
    "text-to-speech": "tiny-speak",
}
"""Each service, and the sample that serves it."""

COUNT: dict[str, Any] = {"messages": [{"role": "user", "content": "count"}]}
PICTURE: dict[str, Any] = {"prompt": "a", "size": "64x64", "num_inference_steps": 100, "n": 10}
"""What keeps the server busy for seconds, and tells each step."""

TEXTS: dict[str, Any] = {"prompt": ["count"] * 64, "max_tokens": 1000, "ignore_eos": True}
"""For generate: what keeps the server busy for seconds, and streams."""

FEW_TEXTS: dict[str, Any] = {**TEXTS, "prompt": ["count"] * 8, "max_tokens": 300}
"""The same for some tenths of a second."""

ONE_STEP: dict[str, Any] = {**PICTURE, "num_inference_steps": 1, "n": 1}

MUCH = 1.0
"""Seconds of the processor's time: less than a long call takes in all, more than one takes after its cancel."""

_STILL = 0.15  # seconds at rest in which a worker that works has taken some of the processor's time


@dataclass(frozen=True)
class RunningEngine:
    """One plugin's engine and a client of the plugin."""

    engine: OpenVinoEngine
    client: PluginClient
    mark: str
    """The value of ENGINE_MARK in the environment of its engine's processes."""

    @property
    def server(self) -> OpenVinoServer:
        """The one that runs."""
        server = self.engine.server
        assert server is not None
        return server

    @property
    def server_process(self) -> psutil.Process:
        """The process of our server."""
        assert self.server.pid is not None
        return psutil.Process(self.server.pid)

    def workers(self) -> list[psutil.Process]:
        """The processes that hold models, in the order of their start."""
        found = [process for process in self.processes() if _holds("openvino_server.worker", process)]
        return sorted(found, key=lambda process: process.create_time())

    def processes(self) -> list[psutil.Process]:
        """The engine's processes that are alive."""
        return [process for process in processes_of(self.mark, ENGINE_MARK) if _lives(process)]

    async def loaded(self) -> list[str]:
        """The names in GetRunningModels."""
        return sorted(model["name"] for model in await self.client.running_models())


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _holds(word: str, process: psutil.Process) -> bool:
    try:
        return any(word in argument for argument in process.cmdline())
    except psutil.Error:
        return False


def spent(worker: psutil.Process) -> float:
    """Seconds of the processor's time that it has taken so far."""
    times = worker.cpu_times()
    return float(times.user + times.system)


async def still(worker: psutil.Process) -> None:
    """Wait until it does nothing."""
    async with asyncio.timeout(LIMIT):
        before = -1.0
        while (now := spent(worker)) != before:
            before = now
            await asyncio.sleep(pace(_STILL))


def tone(seconds: float = 1.0) -> str:
    """A WAV of 16 kHz mono in base64."""
    length = int(16_000 * seconds)
    second = struct.pack("<16000h", *(int(8000 * math.sin(number / 8)) for number in range(16_000)))
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((second * math.ceil(seconds))[: 2 * length])
    return base64.b64encode(sound.getvalue()).decode()
