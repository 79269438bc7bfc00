"""A hosted default plugin over the embedded server, and everything that descends from it."""

from __future__ import annotations

import os
import time
import uuid
from typing import TYPE_CHECKING

import psutil

from engine_plugin.host import launch
from tests.engines.llamacpp.running import REPOSITORY, eventually, gone, processes_of
from tests.hosted_at_pace import HOSTED
from tests.patience import LIMIT, pace
from tests.shipped import shipped, write_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.host import LogLine, PluginClient

__all__ = ["HostedScene"]

MARK = "HOSTED_OPENVINO_TEST"


class HostedScene:
    """A directory with a plugin.yaml, and everything that descends from the plugins in it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.data = place / "data"
        self.temporary = place / "tmp"
        self.temporary.mkdir()
        self.mark = uuid.uuid4().hex
        self.logged: list[LogLine] = []
        self.env = {MARK: self.mark, "TMPDIR": str(self.temporary), "PYTHONPATH": str(REPOSITORY)}
        self.env["TEST_PACE"] = str(pace(1.0))
        self.configure({})

    def configure(self, timeouts: Mapping[str, float], **options: object) -> None:
        """Write the default plugin's plugin.yaml, with these timeouts of services and options of the engine."""
        shape = shipped("openvino")
        for service in shape["services"]:
            if service["service_name"] in timeouts:
                service["timeout"] = timeouts[service["service_name"]]
        shape["engine"] |= {"backend": "embedded", "threads": 1, "restart_backoff": 0.02} | options
        shape["resources"]["data_dir"] = str(self.data)
        write_manifest(self.place, shape)

    async def launch(self) -> PluginClient:
        """The plugin, hosted by this process."""
        return await launch(HOSTED, cwd=self.place, env=self.env, start_timeout=LIMIT, on_log=self.logged.append)

    # Who is there

    def family(self, word: str = "") -> list[psutil.Process]:
        """Live processes with the mark and, if given, the argument `word` (a verb or a module); oldest first."""
        found = [process for process in processes_of(self.mark, MARK) if not gone(process)]
        if word:
            found = [process for process in found if _holds(process, word)]
        return sorted(found, key=_age)

    def workers(self) -> list[psutil.Process]:
        """Those that hold models, in the order of their start."""
        return self.family("openvino_server.worker")

    def server(self) -> psutil.Process:
        """The embedded server."""
        [found] = self.family("serve")
        return found

    async def gone(self, seconds: float) -> None:
        """Wait until the whole family is."""
        try:
            await eventually(lambda: not self.family(), seconds)
        except TimeoutError:
            left = [process.cmdline() for process in self.family() if process.is_running()]
            raise AssertionError(f"after {seconds:g} s there still are {left}") from None

    def left(self) -> list[str]:
        """What is on the disk that a plugin which ended does not leave."""
        found = list(self.temporary.iterdir())
        for pattern in ("served/*", "run/*.json", "**/*.sock", "**/*.key", "models/.*/*.tmp"):
            found += self.data.glob(pattern)
        return sorted(str(path.relative_to(self.place)) for path in found)

    def age(self) -> None:
        """Make what a plugin left look older than what one may be about to use."""
        for folder in self.temporary.iterdir():
            then = time.time() - 60
            os.utime(folder, (then, then))


def _holds(process: psutil.Process, word: str) -> bool:
    try:
        return any(argument == word or argument.endswith(f".{word}") for argument in process.cmdline())
    except psutil.Error:
        return False


def _age(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0
