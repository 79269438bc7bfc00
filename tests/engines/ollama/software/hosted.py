"""The shipped Ollama plugin as a host starts it, with a data directory for the test."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from engine_plugin.host import launch
from tests.engines.llamacpp.running import MARK, processes_of
from tests.engines.ollama.contract.handle import ContractClient
from tests.patience import LIMIT, pace
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.host import PluginClient

__all__ = ["Hosted", "hosted"]

_ARGV = [sys.executable, "-m", "engine_plugin.app"]


@dataclass(frozen=True)
class Hosted:
    """The process of a plugin, and the host's connection to it."""

    client: PluginClient
    environ: dict[str, str]

    async def contract(self) -> ContractClient:
        """The managed server."""
        host = (await self.client.get_config())["host"]
        return ContractClient(int(host.rpartition(":")[2]))

    def offspring(self) -> list[psutil.Process]:
        """All descendants of the plugin, also those that left its process group."""
        return [each for each in processes_of(self.environ[MARK]) if each.pid != self.client.pid]

    def server(self) -> psutil.Process | None:
        """The process of the server, below its guard; None if there is none."""
        for each in self.offspring():
            with contextlib.suppress(psutil.Error):
                if any(word.endswith("/bin/ollama") for word in each.cmdline()[:3]):
                    return each
        return None

    async def loaded(self) -> list[str]:
        """The names in GetRunningModels."""
        return sorted(entry["name"] for entry in await self.client.running_models())

    async def say(self, words: str) -> str:
        """The text of a chat answer."""
        request = {"model": "fresh", "messages": [{"role": "user", "content": f"say {words}"}]}
        text: str = (await self.client.invoke("chat", request))["choices"][0]["message"]["content"]
        return text


async def hosted(root: Path, environ: dict[str, str], **options: Any) -> Hosted:
    """Launch the plugin; `options` go to the `engine:` section. The caller kills it."""
    shape = shipped("ollama")
    shape["engine"] |= {"start_timeout": pace(15), "stop_timeout": 5, "restart_backoff": 0.02} | options
    shape["resources"]["data_dir"] = str(root / "data")
    folder = root / "ollama-plugin"
    folder.mkdir(exist_ok=True)
    write_manifest(folder, shape)
    return Hosted(await launch(_ARGV, cwd=folder, env=environ, start_timeout=LIMIT), environ)
