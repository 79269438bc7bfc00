"""The names inside an archive: which of them are safe on every system, and where links lead."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["Tree", "refusal"]

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\\ud800-\udfff]')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_LONGEST_PART = 255
_LONGEST = 1024
_DEEPEST = 64
_MOST_LINKS = 16


def refusal(name: str) -> str:
    """A member's name for a message: short, and with nothing in it that a terminal would obey."""
    return repr(name if len(name) <= 100 else f"{name[:100]}…")


def _parts(name: str) -> tuple[str, ...] | str:
    """A member's path in pieces, or what is wrong with it."""
    if name.startswith("/"):
        return "has an absolute path"
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        return "climbs out of its directory"
    if len(name) > _LONGEST:
        return "has too long a path"
    if len(parts) > _DEEPEST:
        return "lies too deep"
    for part in parts:
        if _FORBIDDEN.search(part) or part[-1] in ". " or _RESERVED.fullmatch(part):
            return "has a name that not every system can have"
        if len(part.encode()) > _LONGEST_PART:
            return "has too long a name"
    return parts


def _folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    """How a file system sees a path that ignores case and knows each character in one form only."""
    return tuple(unicodedata.normalize("NFC", part).casefold() for part in parts)


class Tree:
    """What the archives of one installation hold: each path once, whatever the case, below directories only."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, ...], tuple[tuple[str, ...], str]] = {}
        self._targets: dict[tuple[str, ...], str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, kind: str) -> tuple[str, ...] | str:
        """Take a member (file, directory, link, or copy: a hard link) and return its path, or why it is refused."""
        parts = _parts(name)
        if isinstance(parts, str):
            return parts
        if not parts:
            return parts if kind == "directory" else "has no name"
        for length in range(1, len(parts)):
            if why := self._put(parts[:length], "directory"):
                return why
        return self._put(parts, kind) or parts

    def _put(self, parts: tuple[str, ...], kind: str) -> str:
        known = self._entries.setdefault(_folded(parts), (parts, kind))
        if known[0] != parts:
            return f"differs only by case from {refusal('/'.join(known[0]))}"
        if known[1] != kind:
            return f"lies where the archive has a {known[1]}, too"
        if kind != "directory" and known[0] is not parts:
            return "occurs twice"
        return ""

    def kind(self, name: str) -> str:
        """What a path that was added is."""
        return self._entries[_folded(tuple(name.split("/")))][1]

    def point(self, name: str, target: str) -> None:
        """Remember where a link or copy leads: from its directory, or, for a copy, from the top."""
        parts = _parts(name)
        if not isinstance(parts, str):
            self._targets[parts] = target

    def follow(self, name: str) -> tuple[str, ...] | str:
        """The file or directory at a link's end, or why the link is refused."""
        parts: tuple[str, ...] = tuple(name.split("/"))
        for _ in range(_MOST_LINKS):
            kind = self.kind("/".join(parts)) if parts else "directory"
            if kind not in ("link", "copy"):
                return parts
            found = self._walk(parts[:-1] if kind == "link" else (), self._targets[parts])
            if isinstance(found, str):
                return found
            parts = found
        return "is a link that leads in a circle"

    def _walk(self, here: tuple[str, ...], target: str) -> tuple[str, ...] | str:
        """Where a link's text leads, step by step, through directories that are no links themselves."""
        if target.startswith("/") or _FORBIDDEN.search(target):
            return f"is a link to {refusal(target)}, which is no place in the archive"
        for step in target.split("/"):
            if here and self._entries[_folded(here)][1] != "directory":
                return f"is a link through another one ({refusal(target)})"
            if step in ("", "."):
                continue
            if step == "..":
                if not here:
                    return f"is a link out of its directory ({refusal(target)})"
                here = here[:-1]
                continue
            here = (*here, step)
            if self._entries.get(_folded(here), ((), ""))[0] != here:
                return f"is a link to {refusal(target)}, which the archive does not hold"
        return here
