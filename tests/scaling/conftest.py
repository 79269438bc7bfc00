"""A cluster of two replicas and a plugin that is attached to it. ENGINE_PLUGIN_RAY_PYTHON names a Python with
ray[serve]; without it nothing here runs."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.engines.openai.engine import OpenAIEngine
from engine_plugin.plugin import Plugin
from engine_plugin.process.ports import free_ports
from tests.engines.openai.conftest import manifest_of
from tests.patience import LIMIT, patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

PYTHON = "ENGINE_PLUGIN_RAY_PYTHON"


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a cluster; afterwards no process of it is left."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no Python with ray[serve]")
    [port] = free_ports(1)
    command = [python, str(Path(__file__).with_name("app.py")), "--port", str(port), "--replicas", "2"]
    with ExitStack() as stack:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(_end, process)
        assert process.stdout is not None
        late = threading.Timer(patience(60), process.kill)
        late.start()
        ready = any(line.strip() == "ready" for line in process.stdout)
        late.cancel()
        assert ready, "the cluster ended, or was ended, before it was ready"
        yield f"http://127.0.0.1:{port}"


def _end(process: subprocess.Popen[str]) -> None:
    """Let it end by itself, with all that it began; else end it."""
    try:
        began = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        began = []
    try:
        process.communicate(timeout=LIMIT)
        _, left = psutil.wait_procs(began, timeout=LIMIT)
    finally:
        process.kill()  # nothing when it has ended
        process.wait()
        for one in began:
            if one.is_running():
                one.kill()
    assert left == [], f"left behind: {left}"


@pytest.fixture
async def plugin(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plugin]:
    """A plugin whose engine_host is the cluster."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    engine = OpenAIEngine(manifest_of(tmp_path / "p", cluster))
    plugin = Plugin(engine.manifest, engine)
    try:
        yield plugin
    finally:
        await plugin.aclose()
