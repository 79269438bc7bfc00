"""What every test may count on."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.host import client
from tests import examples, patience, provoked

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

REPORT = pytest.StashKey[list[str]]()
"""Lines that tests want to be shown at the end of the run."""

TOGETHER = ("tests/all_engines/", "tests/engines/ollama/services/")
"""Packages that one worker of pytest-xdist runs, since their servers are fixtures of the package."""

# Container images often set this; each of the hundreds of Pythons that tests start would compile our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell, nohup or a service manager may start us with some signals ignored, and our children would inherit that.
for _name in ("SIGINT", "SIGQUIT", "SIGHUP"):
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a unix socket's name, which pytest's own may not."""
    path = Path(tempfile.mkdtemp(prefix="ept-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _provokes_what_it_should(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the catalogue's page of tests names this one, that failure must really have been told."""
    due = provoked.due(request.node.nodeid)
    if not due:
        yield
        return
    with provoked.listening() as said:
        yield
    assert due <= said, f"not provoked: {', '.join(sorted(due - said))}"


@pytest.fixture(autouse=True)
def _the_host_waits_as_long_as_this_machine_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would kill plugins that are about to end."""
    for name in ("SHUTDOWN_TIMEOUT", "EXIT_TIMEOUT"):
        monkeypatch.setattr(client, name, patience.pace(2.0))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = []
    examples.load_profile()


def pytest_report_header() -> str:
    spawn, factor = patience.SPAWN_SECONDS * 1000, patience.slowness()
    return f"machine: Python starts in {spawn:.0f} ms; time limits are {factor:.1f} times those of a machine at rest"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Tests wait about as much as they compute."""
    return (os.cpu_count() or 1) + 2


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from the many objects of the collection, which all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With `--dist loadfile`, a package whose files share a server is one piece of work, as a file is."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # pytest-xdist has no types here
        def _split_scope(self, nodeid: str) -> str:
            return next(filter(nodeid.startswith, TOGETHER), super()._split_scope(nodeid))

    return Scheduling(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker begins the longest when the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its lines to the one that reports."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["report"] = session.config.stash[REPORT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker has to report; one that crashed has nothing."""
    node.config.stash[REPORT] += getattr(node, "workeroutput", {}).get("report", [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[REPORT]:
        terminalreporter.section("measured")
        for line in config.stash[REPORT]:
            terminalreporter.write_line(line)
