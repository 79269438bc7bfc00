"""The kinds of servers, in the order in which one is asked whether it is of the kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.engines.openai.servers.llama_server import LlamaServer
from engine_plugin.engines.openai.servers.lmstudio import LmStudio
from engine_plugin.engines.openai.servers.other import Other
from engine_plugin.engines.openai.servers.ovms import Ovms
from engine_plugin.engines.openai.servers.ovo import Ovo
from engine_plugin.engines.openai.servers.vllm import VLlm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.engines.openai.servers.base import Server

__all__ = ["SERVERS", "WELL_KNOWN_PORTS"]

SERVERS: Sequence[Server] = (VLlm(), LlamaServer(), LmStudio(), Ovo(), Ovms(), Other())

WELL_KNOWN_PORTS = {1234: "LM Studio", 8000: "vLLM or Ray Serve", 8080: "llama-server", 11436: "OVO"}
"""Where such servers listen on this machine unless told otherwise, in the order in which they are preferred."""
