from __future__ import annotations

import importlib
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from engine_plugin.system.deferred import defer
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with `slow`, which counts its loads, `broken`, and `blocked`, which waits for an event."""
    name = "package_for_defer"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("loaded = []\nfrom . import slow\n")
    (folder / "slow.py").write_text(f"from {name} import loaded\nloaded.append(__name__)\nvalue = 5\n")
    (folder / "broken.py").write_text("import no_such_module\n")
    (folder / "blocked.py").write_text("begun.set()\nassert go_on.wait(limit)\nvalue = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in (name, f"{name}.slow", f"{name}.broken", f"{name}.blocked"):
        sys.modules.pop(module, None)


def test_deferred_module_is_loaded_by_its_first_use(package: str) -> None:
    """Not by imports of it, nor by the deferral itself, which does not load its package either."""
    defer(f"{package}.slow")
    assert package not in sys.modules
    top = importlib.import_module(package)
    slow = importlib.import_module(f"{package}.slow")
    assert top.loaded == []
    assert slow.__name__ == f"{package}.slow"
    assert slow.value == 5
    assert slow.value == 5
    assert top.loaded == [f"{package}.slow"]
    assert type(slow) is type(sys)
    with pytest.raises(AttributeError, match="no_such_name"):
        slow.no_such_name  # noqa: B018  # the access is what is tested


def test_loaded_and_missing_modules_stay_as_they_are(package: str) -> None:
    before = sys.modules["os"]
    defer("os", "no_such_module", f"{package}.no_such_module", "no_such_package.module")
    assert sys.modules["os"] is before
    assert "no_such_module" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")


def test_error_of_a_deferred_module_is_raised_where_it_is_used(package: str) -> None:
    """Also at the next use, not as a module without attributes."""
    defer(f"{package}.broken")
    broken = importlib.import_module(f"{package}.broken")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            broken.value  # noqa: B018  # the access is what is tested


def test_thread_waits_for_a_module_that_another_thread_loads(package: str) -> None:
    defer(f"{package}.blocked")
    blocked = importlib.import_module(f"{package}.blocked")
    begun, go_on = threading.Event(), threading.Event()
    vars(blocked).update(begun=begun, go_on=go_on, limit=LIMIT)
    seen: list[object] = []

    def use() -> None:
        seen.append(getattr(blocked, "value", "missing"))

    threads = [threading.Thread(target=use) for _ in range(2)]
    threads[0].start()
    assert begun.wait(LIMIT)
    threads[1].start()
    threads[1].join(0.1)  # a thread that does not wait ends at once
    go_on.set()
    for thread in threads:
        thread.join(LIMIT)
    assert seen == [5, 5]
