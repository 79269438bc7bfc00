"""Limits of the system on a process, and the errors where they are too low."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.server.hosts import Host
from engine_plugin.server.servicer import ProviderServicer
from tests.goplugin.conftest import launch as launch  # noqa: PLC0414  # fixtures
from tests.goplugin.conftest import start as start  # noqa: PLC0414
from tests.goplugin.hosting import ROOT, environ
from tests.patience import LIMIT

# The child ends and leaves a process, which becomes the script's; what the script spawns itself keeps its status.
HEIR = """
import asyncio, ctypes, subprocess, sys
import psutil
from engine_plugin.cli import orphans
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
STAYS = "import sys; sys.stdin.read()"
LEAVES = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {STAYS!r}]).pid, flush=True)"
async def main():
    with orphans.reaping_orphans(0.05):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LEAVES, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        orphan = psutil.Process(int(await child.stdout.readline()))
        child.stdin.close()
        while orphan.is_running() and psutil.pid_exists(orphan.pid):
            await asyncio.sleep(0.01)
        await child.wait()
        own = await asyncio.create_subprocess_exec(sys.executable, "-c", "raise SystemExit(7)")
        print("reaped", await own.wait())
asyncio.run(main())
"""


@pytest.mark.promise("L9")
@pytest.mark.skipif(sys.platform != "linux", reason="psutil reads another process's limits on Linux only")
async def test_plugin_raises_its_limit_of_open_files(launch: Any) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        plugin = await launch()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert psutil.Process(plugin.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (min(hard, 65_536), hard)


@pytest.mark.promise("L9")
async def test_call_beyond_the_limit_of_open_files_is_503_with_a_fix() -> None:
    class Full:
        manifest = SimpleNamespace(engine_name="llamacpp")

        async def running_models(self) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/data/models")

    plugin: Any = Full()
    call: Any = SimpleNamespace(end_with=lambda _metadata: None)
    answer = await ProviderServicer(plugin, Host()).GetRunningModels(pb.GetRunningModelsRequest(), call)
    assert answer.code == 503
    assert "Raise the limit of open files (ulimit -n)" in answer.message


@pytest.mark.promise("L9")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to a process that asks for them")
def test_serve_as_pid_1_reaps_inherited_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEIR], env=environ(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.stdout, done.stderr) == ("reaped 7\n", "")
