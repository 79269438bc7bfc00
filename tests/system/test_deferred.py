from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import pytest

from engine_plugin.system.deferred import defer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with the modules `slow`, which counts its loads, and `broken`."""
    name = "package_for_defer"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("loaded = []\nfrom . import slow\n")
    (folder / "slow.py").write_text(f"from {name} import loaded\nloaded.append(__name__)\nvalue = 5\n")
    (folder / "broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in (name, f"{name}.slow", f"{name}.broken"):
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
    defer(f"{package}.broken")
    broken = importlib.import_module(f"{package}.broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        broken.value  # noqa: B018  # the access is what is tested
