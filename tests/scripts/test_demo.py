"""The demo's report of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.skipif(os.name != "posix", reason="Windows lists no process that has ended")
def test_ended_process_is_not_reported_as_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may still be a zombie: init reaps a worker, with some delay."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    try:
        assert demo.runs(process)
        os.kill(child.pid, 9)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.status() == psutil.STATUS_ZOMBIE
        assert not demo.runs(process)
    finally:
        child.kill()
        child.communicate()
    assert not demo.runs(process)
