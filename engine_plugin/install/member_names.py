"""Checks the names of archive members: valid on every system, unique, and with links that stay inside."""

from __future__ import annotations

import re
import unicodedata

from engine_plugin.system.names import is_device_name

__all__ = ["MemberTree", "quoted_name"]

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\\ud800-\udfff]')
_LONGEST_PART = 255
_LONGEST = 1024
_DEEPEST = 64
_MOST_LINKS = 16


def quoted_name(name: str) -> str:
    """A member's name for a message: shortened and escaped."""
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def _parts(name: str) -> tuple[str, ...] | str:
    """Split a member's path, or return the reason why it is invalid."""
    if name.startswith("/"):
        return "has an absolute path"
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        return "leads out of its directory"
    if len(name) > _LONGEST:
        return f"has a path of more than {_LONGEST} characters"
    if len(parts) > _DEEPEST:
        return f"is nested more than {_DEEPEST} levels deep"
    for part in parts:
        if _FORBIDDEN.search(part) or part[-1] in ". " or is_device_name(part):
            return "has a name that is invalid on some systems"
        if len(part.encode()) > _LONGEST_PART:
            return f"has a name of more than {_LONGEST_PART} bytes"
    return parts


def _folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The path as a case-insensitive file system with Unicode normalization compares it."""
    return tuple(unicodedata.normalize("NFC", part).casefold() for part in parts)


class MemberTree:
    """The members of an installation's archives.

    Each path is unique, regardless of case, and below directories only.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}
        self._targets: dict[tuple[str, ...], str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, kind: str) -> tuple[str, ...] | str:
        """Add a member of kind file, directory, link or copy (a hard link).

        Returns its path, or why it is rejected.
        """
        parts = _parts(name)
        if isinstance(parts, str):
            return parts
        if not parts:
            return parts if kind == "directory" else "has no name"
        for length in range(1, len(parts)):
            if why := self._enter(parts[:length], "directory"):
                return why
        return self._enter(parts, kind) or parts

    def _enter(self, parts: tuple[str, ...], kind: str) -> str:
        known = self._entries.setdefault(_folded(parts), (parts, kind))
        if known[0] != parts:
            return f"differs only by case from {quoted_name('/'.join(known[0]))}"
        if known[1] != kind:
            return f"has the path of another member, a {known[1]}"
        if kind != "directory" and known[0] is not parts:
            return "occurs twice"
        return ""

    def kind(self, name: str) -> str:
        """The kind of a path that was added."""
        return self._entries[_folded(tuple(name.split("/")))][1]

    def set_target(self, name: str, target: str) -> None:
        """Set the target of a link, relative to its directory, or of a copy, relative to the root."""
        parts = _parts(name)
        if not isinstance(parts, str):
            self._targets[parts] = target

    def resolve(self, name: str) -> tuple[str, ...] | str:
        """The file or directory at the end of a link, or why the link is rejected."""
        parts: tuple[str, ...] = tuple(name.split("/"))
        for _ in range(_MOST_LINKS):
            kind = self.kind("/".join(parts)) if parts else "directory"
            if kind not in ("link", "copy"):
                return parts
            found = self._resolve_from(parts[:-1] if kind == "link" else (), self._targets[parts])
            if isinstance(found, str):
                return found
            parts = found
        return "is part of a cycle of links"

    def _resolve_from(self, here: tuple[str, ...], target: str) -> tuple[str, ...] | str:
        """Resolve the text of a link from `here`, through directories that are not links."""
        if target.startswith("/") or _FORBIDDEN.search(target):
            return f"is a link to {quoted_name(target)}, which is not a path in the archive"
        for step in target.split("/"):
            if here and self._entries[_folded(here)][1] != "directory":
                return f"is a link through another one ({quoted_name(target)})"
            if step in ("", "."):
                continue
            if step == "..":
                if not here:
                    return f"is a link that leads out of its directory ({quoted_name(target)})"
                here = here[:-1]
                continue
            here = (*here, step)
            if self._entries.get(_folded(here), ((), ""))[0] != here:
                return f"is a link to {quoted_name(target)}, which is not in the archive"
        return here
