"""Memory figures from files in the kernel's format."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from engine_plugin.process import memory

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.promise("U8"),
    pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's"),
]

MIB = 1024 * 1024
STAT = f"anon 1\ninactive_file {20 * MIB}\nactive_file {10 * MIB}\nfile 3\n"


class Kernel:
    """A private /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc, self.groups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        monkeypatch.setattr(memory, "PROC", self.proc)
        monkeypatch.setattr(memory, "CGROUPS", self.groups)

    def write(self, path: str, text: str) -> None:
        file = self.groups / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def place(self, text: str) -> None:
        (self.proc / "self" / "cgroup").write_text(text)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_tightest_cgroup_decides_and_its_cache_counts_as_free(kernel: Kernel) -> None:
    kernel.place("0::/a/b\n")
    kernel.write("a/memory.max", f"{256 * MIB}\n")
    kernel.write("a/memory.current", f"{200 * MIB}\n")
    kernel.write("a/memory.stat", STAT)
    kernel.write("a/b/memory.max", "max\n")
    kernel.write("a/b/memory.events", "low 0\noom_kill 2\n")
    assert memory.room() == memory.Room(86 * MIB, 256 * MIB, "container")
    assert str(memory.room()) == "86 MiB of the container's 256 MiB are free"
    assert memory.kills() == 2
    said = memory.shortage(-signal.SIGKILL, "", 1, 5 * MIB)
    assert said.startswith("It was ended for lack of memory: 86 MiB of the container's 256 MiB are free")
    assert "the model's files have 5 MiB" in said
    assert memory.shortage(-signal.SIGKILL, "", 2) == "", "killed from outside"


def test_cgroups_v1_limits_are_read(kernel: Kernel) -> None:
    """As in a container, where the path is the host's and only the root is seen."""
    kernel.place("4:cpu,cpuacct:/x\n3:memory:/docker/123\n0::/\n")
    kernel.write("memory/memory.limit_in_bytes", f"{256 * MIB}\n")
    kernel.write("memory/memory.usage_in_bytes", f"{250 * MIB}\n")
    kernel.write("memory/memory.stat", f"total_inactive_file {6 * MIB}\ntotal_active_file 0\n")
    kernel.write("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert memory.room() == memory.Room(12 * MIB, 256 * MIB, "container")
    assert memory.kills() == 3


def test_figures_without_cgroups_are_those_of_the_machine(kernel: Kernel) -> None:
    assert memory.room().whose == "machine"
    assert memory.kills() is None
    assert memory.shortage(-signal.SIGKILL, "", None).startswith("It may have been ended for lack of memory: ")
    (kernel.proc / "vmstat").write_text("nr_free_pages 5\noom_kill 4\n")
    assert memory.kills() == 4


@pytest.mark.parametrize("said", ["terminate called: std::bad_alloc", "MemoryError", "mmap: Cannot allocate memory"])
def test_shortage_of_memory_is_recognized_from_the_output(said: str) -> None:
    assert memory.shortage(-signal.SIGABRT, said, 0).startswith("It got too little memory: ")
    assert memory.shortage(None, said, 0)
    assert memory.shortage(3, "cannot read the file", 0) == ""


@pytest.mark.promise("L7")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not counted by files")
def test_system_without_memory_figures_rejects_no_model(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    def untold() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", untold)
    room = memory.room()
    assert room.free == room.total > 0
    assert room.whose == "machine"
    assert kernel.proc.is_dir()
