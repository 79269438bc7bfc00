"""The stand-in for ovms differs from the embedded server where the real ovms does."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

import engine_plugin
from engine_plugin.engines.openvino.software import server_environ
from engine_plugin.install.software import Backend
from tests.engines.openvino.fake_ovms.archives import install
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line"),
]

CHAT = Path(engine_plugin.__file__).parent / "samples" / "openvino" / "tiny-chat"
HELLO = {"model": "tiny/chat", "messages": [{"role": "user", "content": "count"}]}
KEY = {"Authorization": "Bearer secret"}
GRAPH = """\
node: {{
  calculator: "HttpLLMCalculator"
  node_options: {{
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {{ models_path: "{path}", device: "CPU" }}
  }}
}}
"""


async def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """What ovms says to a command line that it does not serve with."""
    executable = install(folder)
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(executable, *arguments, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(child.communicate(), LIMIT)
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


class Served:
    """A running one with its config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.json"
        self.session: aiohttp.ClientSession

    def configure(self, path: Path | str, note: str = "") -> None:
        """Serve the model at `path`; a `note` makes config.json another file."""
        (self.folder / "graph.pbtxt").write_text(GRAPH.format(path=path))
        entry = {"name": "tiny/chat", "base_path": str(self.folder), "graph_path": "graph.pbtxt"}
        self.config.write_text(json.dumps({"mediapipe_config_list": [entry], "model_config_list": []}) + note)

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any]:
        async with self.session.request(method, path, **more) as answer:
            return answer.status, await answer.json()

    async def states(self) -> list[tuple[str, str]]:
        _status, shape = await self.ask("GET", "/v1/config")
        found = [version["model_version_status"][0] for version in shape.values()]
        return [(version["state"], version["status"]["error_code"]) for version in found]

    async def available(self) -> None:
        async with asyncio.timeout(LIMIT):
            while True:
                try:
                    if await self.states() == [("AVAILABLE", "OK")]:
                        return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)  # there is no event to wait for


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Served]:
    served = Served(folder)
    executable = str(install(folder))
    served.configure(CHAT)
    (folder / "key").write_text("secret\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [executable, "--rest_port", str(port), "--rest_bind_address", "127.0.0.1", "--config_path"]
    argv += [str(served.config), "--api_key_file", str(folder / "key"), "--file_system_poll_wait_seconds", "0"]
    environ = server_environ(Backend("ovms", "", "", executable=executable), os.environ)
    with (folder / "log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(*argv, env=environ, stdout=log, stderr=log)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as served.session:
            await served.available()
            yield served
    finally:
        child.terminate()
        await asyncio.wait_for(child.wait(), LIMIT)


async def test_command_line_of_the_stand_in(scratch: Path) -> None:
    status, out, _err = await run(scratch / "1", "--version")
    assert (status, out.splitlines()[0]) == (0, "OpenVINO Model Server 2026.3.0.0123456789ab")
    status, _out, err = await run(scratch / "2", "--rest_port", "1", "--warp", "9")
    assert (status, "unmatched arguments: --warp" in err) == (64, True)
    status, out, _err = await run(scratch / "3", "--rest_port", "1", "--config_path", "/nowhere/config.json")
    assert (status, "Couldn't start model manager" in out) == (1, True)


async def test_stand_in_answers_as_ovms_does(scratch: Path) -> None:
    async with serving(scratch) as served:
        status, shape = await served.ask("POST", "/v3/chat/completions", json=HELLO)
        assert (status, "api-key" in shape["error"]) == (500, True)
        status, shape = await served.ask("POST", "/v3/chat/completions", json=HELLO, headers=KEY)
        assert (status, shape["choices"][0]["message"]["content"][:7]) == (200, "one two")
        status, shape = await served.ask("POST", "/v3/chat/completions", json={**HELLO, "messages": 7}, headers=KEY)
        assert (status, shape["error"].startswith("Mediapipe execution failed")) == (400, True)
        status, shape = await served.ask("POST", "/v3/chat/completions", json={**HELLO, "model": "x"}, headers=KEY)
        assert (status, type(shape["error"])) == (404, str)
        served.configure("/nowhere")
        served.config.write_text(served.config.read_text())
        assert (await served.ask("POST", "/v1/config/reload"))[0] == 200, "config.json is the same: nothing is read"
        served.configure("/nowhere", " ")
        status, shape = await served.ask("POST", "/v1/config/reload")
        assert (status, "Check server logs" in shape["error"]) == (412, True)
        assert await served.states() == [("LOADING", "FAILED_PRECONDITION")]
        assert "/nowhere: the folder does not exist" in (scratch / "log").read_text()
        served.configure(CHAT, "  ")
        assert (await served.ask("POST", "/v1/config/reload"))[0] == 201
        served.config.write_text(json.dumps({"mediapipe_config_list": [], "model_config_list": []}))
        assert (await served.ask("POST", "/v1/config/reload"))[0] == 201
        assert await served.states() == [("END", "OK")]
