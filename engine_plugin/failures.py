"""An entry of the catalogue: one failure with its texts, its error class and its fields."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from typing import Any

__all__ = ["Entry"]

ErrorT = TypeVar("ErrorT", bound=EnginePluginError)
OtherT = TypeVar("OtherT", bound=EnginePluginError)


@dataclass(frozen=True, slots=True)
class Entry(Generic[ErrorT]):
    """One failure. `what` and `fix` are templates with the same kind of fields as `str.format`; `cause` and `remedy`
    are prose for docs/troubleshooting.md. `names` are the fields that the error carries for programs: fields of
    the templates, and those that the caller adds."""

    id: str
    raises: type[ErrorT]
    what: str
    fix: str
    cause: str
    remedy: str
    names: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The message with its fields unfilled."""
        return f"{self.what}. {self.fix}"

    @property
    def fields(self) -> frozenset[str]:
        """The names of the fields that a message needs."""
        return frozenset(name for _, name, _, _ in string.Formatter().parse(self.template) if name)

    def text(self, **fields: Any) -> str:
        """Format the message. Raises TypeError unless the fields are exactly those of the templates."""
        if fields.keys() != self.fields:
            raise TypeError(f"{self.id} needs {sorted(self.fields)}, not {sorted(fields)}")
        return self.template.format(**fields)

    def error(self, **fields: Any) -> ErrorT:
        """The exception to raise. Raises TypeError as `text` does."""
        return self.error_as(self.raises, **fields)

    def error_as(self, raises: type[OtherT], /, **fields: Any) -> OtherT:
        """Like `error`, with another class of the same code, for callers that document that class."""
        error = raises(self.text(**fields), **{name: fields[name] for name in self.names if name in fields})
        error.id = self.id
        return error
