"""A program that runs a managed server, prints its pids and address, and waits to be killed.

python -m tests.engines.ollama.software.plugin FOLDER OLLAMA
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.server_process import OllamaProcess
from engine_plugin.install.software import Backend
from engine_plugin.process.records import ProcessRecords


async def _run(folder: Path, program: str) -> None:
    records = ProcessRecords(folder / "run")
    server = OllamaProcess(
        Backend("ollama", "", program, program), OllamaOptions(), records, folder, dict(os.environ)
    )
    try:
        await server.ensure_ready()
        await server.client().ask("POST", "/api/pull", {"model": "fresh", "stream": False})
        await server.client().ask("POST", "/api/chat", {"model": "fresh", "messages": []})
        print(json.dumps({"address": server.address}), flush=True)
        await asyncio.get_running_loop().create_future()
    finally:
        await server.close()


if __name__ == "__main__":
    asyncio.run(_run(Path(sys.argv[1]), sys.argv[2]))
