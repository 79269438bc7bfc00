"""The stats of the files of models that are looked at with each call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.models.folders import WatchedFolders, files_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LONG_AGO = 1_600_000_000


def settle(folder: Path) -> None:
    """Give all folders a time that lies long back, as those of a model have."""
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        os.utime(place, (LONG_AGO, LONG_AGO))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "inner" / "innermost").mkdir(parents=True)
    for name in ("a.xml", "a.bin", "inner/b.bin", "inner/innermost/c.bin", ".hidden"):
        (folder / name).write_bytes(name.encode())
    settle(folder)
    return folder


def expected(folder: Path) -> list[tuple[int, int]]:
    return sorted((stat.st_size, stat.st_mtime_ns) for _, stat in files_of(folder))


def found(watched: WatchedFolders, folder: Path) -> list[tuple[int, int]]:
    return sorted((stat.st_size, stat.st_mtime_ns) for stat in watched.stats(folder))


def _replace(model: Path) -> None:
    (model / "new").write_bytes(b"another model")
    (model / "new").replace(model / "inner" / "b.bin")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "overwritten": lambda model: (model / "a.bin").write_bytes(b"longer than before"),
    "touched": lambda model: os.utime(model / "inner" / "b.bin", (1, 1)),
    "added": lambda model: (model / "z.bin").write_bytes(b"z"),
    "added in the innermost folder": lambda model: (model / "inner" / "innermost" / "z").write_bytes(b"z"),
    "deleted": lambda model: (model / "inner" / "innermost" / "c.bin").unlink(),
    "replaced": _replace,
    "renamed to a hidden name": lambda model: (model / "a.bin").rename(model / ".a.bin"),
    "a new folder": lambda model: (model / "more").mkdir(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_seen_at_once(model: Path, change: str) -> None:
    watched = WatchedFolders()
    for _ in range(3):
        assert found(watched, model) == expected(model)
    CHANGES[change](model)
    for _ in range(3):
        assert found(watched, model) == expected(model)
    settle(model)
    (model / "later").write_bytes(b"later")
    assert found(watched, model) == expected(model)


def test_names_of_a_settled_folder_are_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedFolders()
    before = found(watched, model)

    def refuse(_path: str) -> None:
        raise AssertionError("the folder is read again")

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(watched, model) == before


def test_folder_that_has_just_changed_is_read_again(model: Path) -> None:
    """A change within the same tick of the file system's clock does not change its time."""
    watched = WatchedFolders()
    (model / "b").write_bytes(b"b")
    assert found(watched, model) == expected(model)
    times = model.stat()
    (model / "c").write_bytes(b"c")
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert found(watched, model) == expected(model)


def test_link_whose_file_comes_later_is_found(model: Path, tmp_path: Path) -> None:
    watched = WatchedFolders()
    (model / "link").symlink_to(tmp_path / "elsewhere")
    settle(model)
    assert found(watched, model) == expected(model)
    (tmp_path / "elsewhere").write_bytes(b"here")
    assert found(watched, model) == expected(model)
    assert len(expected(model)) == 5


def test_missing_folder_raises_and_may_return(model: Path) -> None:
    watched = WatchedFolders()
    before = found(watched, model)
    model.rename(model.with_name("aside"))
    with pytest.raises(FileNotFoundError):
        watched.stats(model)
    model.with_name("aside").rename(model)
    assert found(watched, model) == before
