"""A file that another user could change is not trusted to name a program."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

import pytest

if sys.platform == "win32":
    pytest.skip("the permissions of Windows are not looked at", allow_module_level=True)

from engine_plugin.system.programs import noexec_doubt, program_doubt
from engine_plugin.system.trust import distrust

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.promise("X1")
STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files that belong to another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A program in a directory in a directory, all private."""
    path = tmp_path / "outer" / "inner" / "program"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    for place, mode in ((path, 0o700), (path.parent, 0o755), (path.parent.parent, 0o755)):
        place.chmod(mode)
    return path


def open_to_all(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWOTH)


def test_own_file_in_private_directories_is_trusted(file: Path) -> None:
    assert distrust(file) is None
    assert distrust(file.parent / ".." / "inner" / "program") is None
    assert distrust(file.parent / "absent" / "later") is None


@pytest.mark.parametrize("level", [0, 1, 2], ids=["file", "directory", "its parent"])
def test_world_writable_file_is_not_trusted(file: Path, level: int) -> None:
    place = [file, *file.parents][level]
    open_to_all(place)
    doubt = distrust(file)
    assert doubt is not None
    assert doubt.what == f"{place} can be written by every user"
    assert doubt.fix == f"Run: chmod o-w {place}"


def test_sticky_world_writable_directory_is_trusted_only_as_an_ancestor(file: Path) -> None:
    shared = file.parent.parent
    shared.chmod(0o1777)
    assert distrust(file) is None
    doubt = distrust(shared)
    assert doubt is not None
    assert str(shared) in doubt.what


def test_every_step_of_a_symlink_is_checked(file: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "second").symlink_to(file)
    first = tmp_path / "first"
    first.symlink_to("shared/second")
    assert distrust(first) is None
    open_to_all(shared)
    assert "shared can be written" in str(distrust(first))
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert "loop cannot be examined" in str(distrust(loop))


@as_root
@pytest.mark.parametrize("level", [0, 1], ids=["file", "directory"])
def test_file_of_another_user_is_not_trusted(file: Path, level: int) -> None:
    place = [file, *file.parents][level]
    os.chown(place, STRANGER, -1)
    doubt = distrust(file)
    assert doubt is not None
    assert doubt.what == f"{place} belongs to another user ({STRANGER})"


@as_root
def test_symlink_of_another_user_in_a_shared_directory_is_not_trusted(file: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    link = shared / "link"
    link.symlink_to(file)
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    assert f"{link} belongs to another user" in str(distrust(link))


def test_group_writable_directory_is_trusted_only_with_the_own_group(file: Path) -> None:
    file.parent.chmod(0o775)
    if os.geteuid() == 0:
        os.chown(file.parent, -1, 0)
        assert distrust(file) is None
        os.chown(file.parent, -1, STRANGER)
        assert f"{file.parent} can be written by the group {STRANGER}" in str(distrust(file))
    else:
        doubt = distrust(file)  # depends on the user's group, but never on more than this directory
        assert doubt is None or str(file.parent) in doubt.what


@pytest.mark.promise("L9")
def test_unrunnable_program_error_names_the_cause(file: Path) -> None:
    assert program_doubt(file) is None
    file.chmod(0o600)
    if os.geteuid() != 0 or not os.access(file, os.X_OK):
        assert f"Run: chmod +x {file}" in str(program_doubt(file))
    file.chmod(0o700)
    file.write_bytes(b"#!/bin/sh\r\nexit 0\r\n")
    assert "ends with CR LF" in str(program_doubt(file))
    file.write_bytes(b"#!/nowhere/python\n")
    assert "the interpreter /nowhere/python, which does not exist" in str(program_doubt(file))
    file.write_bytes(b"#!/usr/bin/env -S sh -e\n")
    assert program_doubt(file) is None


@pytest.mark.promise("L9")
def test_noexec_mount_is_named_in_the_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert noexec_doubt(file.parent / "not yet" / "there") is None

    class Flags:
        f_flag = 8

    monkeypatch.setattr(os, "statvfs", lambda _path: Flags)
    monkeypatch.setattr(os, "ST_NOEXEC", 8, raising=False)
    doubt = noexec_doubt(file.parent / "not yet" / "there")
    assert doubt is not None
    assert f"{file.parent} is on a file system mounted noexec" in doubt.what
    assert "chmod" not in doubt.fix
    assert program_doubt(file) is not None
