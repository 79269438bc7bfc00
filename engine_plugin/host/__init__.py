"""The host side of the contract: discover plugins, launch them, call their services.

    from engine_plugin.host import PluginRegistry, events

    registry = PluginRegistry.discover(Path("plugins"))
    async with await registry.launch("openvino-plugin") as plugin:
        answer = await plugin.invoke("chat", {"messages": [{"role": "user", "content": "Hello"}]})

See docs/host.md.
"""

from __future__ import annotations

from engine_plugin.host.client import PluginClient
from engine_plugin.host.launch import connect, launch
from engine_plugin.host.logs import LogLine
from engine_plugin.host.registry import PluginRegistry
from engine_plugin.host.sse import EventSplitter, events
from engine_plugin.host.streams import BidiCall, BidiMessage, ChunkStream
from engine_plugin.protocol.shapes import (
    EngineCheck,
    EngineConfig,
    LoadedModel,
    ModelDetails,
    ModelEntry,
    OperateStatus,
    PullOptions,
    PullProgress,
)

__all__ = [
    "BidiCall",
    "BidiMessage",
    "ChunkStream",
    "EngineCheck",
    "EngineConfig",
    "EventSplitter",
    "LoadedModel",
    "LogLine",
    "ModelDetails",
    "ModelEntry",
    "OperateStatus",
    "PluginClient",
    "PluginRegistry",
    "PullOptions",
    "PullProgress",
    "connect",
    "events",
    "launch",
]
