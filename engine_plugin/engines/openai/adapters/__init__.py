"""The adapters, in the order in which a server is matched with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.engines.openai.adapters.generic import GenericAdapter
from engine_plugin.engines.openai.adapters.llama_server import LlamaServerAdapter
from engine_plugin.engines.openai.adapters.lmstudio import LmStudioAdapter
from engine_plugin.engines.openai.adapters.ovms import OvmsAdapter
from engine_plugin.engines.openai.adapters.ovo import OvoAdapter
from engine_plugin.engines.openai.adapters.vllm import VllmAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.engines.openai.adapters.base import ServerAdapter

__all__ = ["ADAPTERS", "WELL_KNOWN_PORTS"]

ADAPTERS: Sequence[ServerAdapter] = (
    VllmAdapter(),
    LlamaServerAdapter(),
    LmStudioAdapter(),
    OvoAdapter(),
    OvmsAdapter(),
    GenericAdapter(),
)

WELL_KNOWN_PORTS = {1234: "LM Studio", 8000: "vLLM or Ray Serve", 8080: "llama-server", 11436: "OVO"}
"""The default ports of servers on this machine, in order of preference."""
