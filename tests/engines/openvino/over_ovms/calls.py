"""Calls of an engine, shared by the tests of this directory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import engine_plugin
from tests.patience import LIMIT

if TYPE_CHECKING:
    from engine_plugin.engines.openvino.engine import OpenVinoEngine

__all__ = ["HELLO", "LIMIT", "SAMPLES", "call"]

SAMPLES = Path(engine_plugin.__file__).parent / "samples" / "openvino"
HELLO = {"model": "tiny-chat", "messages": [{"role": "user", "content": "count"}]}


async def call(engine: OpenVinoEngine, service: str, **request: Any) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT):
        shape: dict[str, Any] = json.loads(await engine.call(service, request))
    return shape
