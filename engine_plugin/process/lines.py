"""Lines of a process's output, which arrives in blocks. Imports only the stdlib."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Lines"]


@dataclass(eq=False)
class Lines:
    """Splits one stream into lines of text; memory is bounded, whatever the process writes."""

    longest: int
    """The most bytes of a line that are kept."""

    _unended: bytes = field(default=b"", init=False)

    def feed(self, block: bytes) -> list[str]:
        """The lines that `block` completes, without white space at their ends; invalid UTF-8 is replaced."""
        *lines, unended = (self._unended + block).split(b"\n")
        self._unended = unended[-self.longest :]
        return [line[: self.longest].decode("utf-8", "replace").rstrip() for line in lines]

    def end(self) -> list[str]:
        """The last line if it has no line end, after the stream has ended."""
        return self.feed(b"\n") if self._unended else []
