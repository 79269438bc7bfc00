"""Checks whether another user could change a file that is a program or names one.

A file is trusted when it and every directory on the way to it, through each symbolic link, belong to this user, to
root, or to the owner of this package, and no other user can write it:

- The owner of the package, and of `/`, can run code as this user already. This lets root use a checkout that an
  account owns, and a container use files that its user namespace shows as those of `nobody`.
- In a directory with the sticky bit, such as /tmp, other users may create files, which belong to them, but cannot
  replace files of this user. Such a directory is trusted on the way to a file, but not as the path itself.
- A group with write permission counts as other users, unless it is this user's private group (with the user's name),
  a group of administrators (gid 0, on macOS also `admin`), or a system group without members.

Windows is not checked: its ACLs are not visible to `os.stat`. There a file is as safe as its directory, as those
below a user's profile and Program Files are.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.errors import PreconditionError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Doubt", "distrust", "require_data_dir"]

_MOST_LINKS = 40  # as Linux
_SYSTEM_GROUPS = 1000  # lower numbers are system groups
_MACOS_ADMIN = 80


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a path is not trusted: `what` is wrong, with the path, and how to `fix` it."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}. {self.fix}"


def require_data_dir(path: Path) -> None:
    """Reject a data directory that another user could change: files in it name programs.

    Called before a plugin is built from a manifest, and by each command. Raises PreconditionError.
    """
    if doubt := distrust(path):
        raise PreconditionError(
            f"the data directory {path} is not used: {doubt}; or name another directory: resources.data_dir in "
            "plugin.yaml, or AOG_DATA_DIR in the environment."
        )


def _hops(path: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Each directory and link on the way to `path`, then its target, marked True. Ends where nothing exists.

    Raises OSError.
    """
    here, links = Path(path.anchor), 0
    todo = list(reversed(path.parts[1:]))
    yield here, here.lstat(), not todo
    while todo:
        name = todo.pop()
        if name == "..":
            here = here.parent
            continue
        place = here / name
        try:
            status = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISLNK(status.st_mode):
            yield place, status, not todo
            here = place
            continue
        yield place, status, False
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = place.readlink()
        here = Path(target.anchor) if target.is_absolute() else here
        todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)


if sys.platform == "win32":

    def distrust(path: Path) -> Doubt | None:  # noqa: ARG001  # what the other systems look at
        """None: permissions are not checked on Windows."""
        return None

else:
    import grp
    import pwd

    def distrust(path: Path) -> Doubt | None:
        """What lets another user change the target of `path`; None if nothing does. Never raises.

        For a missing path, the part that exists is checked. Costs a few system calls.
        """
        try:
            for place, status, last in _hops(path.absolute()):
                if doubt := _owner_doubt(place, status) or _mode_doubt(place, status, last=last):
                    return doubt
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return Doubt(f"{path} cannot be examined: {reason}", "Correct its permissions, or use another place")
        return None

    def _owner_doubt(place: Path, status: os.stat_result) -> Doubt | None:
        if status.st_uid in _trusted_users():
            return None
        fix = "Use a place that belongs to you or root, or change its owner (chown) if it is meant to be yours"
        return Doubt(f"{place} belongs to another user ({_user_name(status.st_uid)})", fix)

    def _mode_doubt(place: Path, status: os.stat_result, *, last: bool) -> Doubt | None:
        mode = status.st_mode
        if stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX and not last):
            return None
        if mode & stat.S_IWOTH:
            return Doubt(f"{place} can be written by every user", f"Run: chmod o-w {shlex.quote(str(place))}")
        if mode & stat.S_IWGRP and not _private_group(status.st_gid):
            group = _group(status.st_gid)
            name = group.gr_name if group else str(status.st_gid)
            return Doubt(f"{place} can be written by the group {name}", f"Run: chmod g-w {shlex.quote(str(place))}")
        return None

    def _trusted_users() -> set[int]:
        return {0, os.geteuid(), Path("/").stat().st_uid, Path(__file__).stat().st_uid}

    def _private_group(gid: int) -> bool:
        """Whether the group has only members that are trusted anyway."""
        if gid == 0 or (sys.platform == "darwin" and gid == _MACOS_ADMIN):
            return True
        group = _group(gid)
        if group is None:
            return str(gid) == _user_name(os.geteuid())  # numbers without names, in a container
        trusted = {_user_name(uid) for uid in _trusted_users()}
        if not trusted.issuperset(group.gr_mem):
            return False
        alone = gid < _SYSTEM_GROUPS and all(user.pw_gid != gid or user.pw_name in trusted for user in pwd.getpwall())
        return group.gr_name in trusted or alone

    def _group(gid: int) -> grp.struct_group | None:
        try:
            return grp.getgrgid(gid)
        except KeyError:
            return None

    def _user_name(uid: int) -> str:
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return str(uid)
