"""Read a request: a JSON object, and fields of the right type."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import MOST_BYTES, JsonError, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "RequestValidator",
    "check_stop",
    "choice",
    "integer",
    "number",
    "optional",
    "parse_request",
    "require",
    "words",
]

_SHOWN = 60
_OPAQUE = frozenset({"parameters", "schema", "arguments"})

_TYPE_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class RequestValidator(ABC):
    """What a request of one service must hold. Stateless; `Plugin` and engines share one instance."""

    name: ClassVar[str]
    nested: ClassVar[frozenset[str]] = frozenset()
    """Fields in whose objects null means "not given", as it does in the request itself."""

    def read(self, data: bytes) -> dict[str, Any]:
        """Parse and check a request, and drop its fields that are null. Raises InvalidRequestError.

        Call it in a thread for more than `jsontext.BRIEF` bytes.
        """
        request = {
            name: _without_nulls(value) if name in self.nested else value
            for name, value in parse_request(data).items()
            if value is not None
        }
        optional(request, "model", str)
        self.check(request)
        return request

    @abstractmethod
    def check(self, request: dict[str, Any]) -> None:
        """Raise InvalidRequestError, naming the field, when no engine could answer this request."""

    def trivial_answer(self, request: dict[str, Any]) -> dict[str, Any] | None:  # noqa: ARG002  # for subclasses
        """The answer to a request that needs no engine (an empty list); None for all others."""
        return None


def parse_request(data: bytes, field: str = "request_data", most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Parse a request's JSON object. Raises InvalidRequestError for anything else; `field` is the rpc's field."""
    if not data:
        raise InvalidRequestError.at(field, "is empty; it must hold a JSON object")
    try:
        request = read_json(data, most_bytes)
    except JsonError as error:
        raise InvalidRequestError.at(field, f"{error}") from None
    if not isinstance(request, dict):
        raise InvalidRequestError.at(field, f"must hold a JSON object, not {_kind(request)}")
    return request


def _without_nulls(value: Any) -> Any:
    """The value without object members that are null: null means "not given" in every request.

    Nulls stay in what goes to a JSON schema, a template or a function, and in a message's `content`, which some
    servers require.
    """
    if isinstance(value, dict):
        return {
            name: item if name in _OPAQUE else _without_nulls(item)
            for name, item in value.items()
            if item is not None or name == "content"
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def require(request: dict[str, Any], field: str, *types: type) -> Any:
    """The value of a required field, of one of `types`. Raises InvalidRequestError."""
    if request.get(field) is None:
        raise InvalidRequestError.at(field, f"is missing; it must be {_either(types)}")
    return optional(request, field, *types)


def optional(request: dict[str, Any], field: str, *types: type) -> Any:
    """The field's value, of one of `types`; None when it is absent or null. Raises InvalidRequestError."""
    value = request.get(field)
    if value is None:
        return None
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise InvalidRequestError.at(field, f"must be {_either(types)}, not {_kind(value)} ({_beginning(value)})")
    return value


def words(request: dict[str, Any], field: str) -> str:
    """The text of a required field, which must hold more than white space. Raises InvalidRequestError."""
    text: str = require(request, field, str)
    if not text or text.isspace():
        raise InvalidRequestError.at(field, "is empty")
    return text


def integer(request: dict[str, Any], field: str, least: int, most: int) -> int | None:
    """The field's whole number within these bounds; None when it is absent or null. Raises InvalidRequestError."""
    value: int | None = _bounded(request, field, least, most, int)
    return value


def number(request: dict[str, Any], field: str, least: float, most: float) -> float | None:
    """The field's number within these bounds; None when it is absent or null. Raises InvalidRequestError."""
    value: float | None = _bounded(request, field, least, most, float, int)
    return value


def _bounded(request: dict[str, Any], field: str, least: float, most: float, *types: type) -> Any:
    value = optional(request, field, *types)
    if value is not None and not least <= value <= most:
        raise InvalidRequestError.at(field, f"must be from {least} to {most}, not {_beginning(value)}")
    return value


def check_stop(request: dict[str, Any]) -> None:
    """Raise InvalidRequestError for a `stop` that is not a text or a list of texts."""
    stop = optional(request, "stop", str, list)
    for index, text in enumerate(stop if isinstance(stop, list) else ()):
        if not isinstance(text, str):
            raise InvalidRequestError.at(f"stop[{index}]", "must be a string")


def choice(request: dict[str, Any], field: str, among: Sequence[str]) -> str | None:
    """The field's text, one of `among`; None when it is absent or null. Raises InvalidRequestError."""
    value: str | None = optional(request, field, str)
    if value is not None and value not in among:
        raise InvalidRequestError.at(field, f"must be {' or '.join(among)}, not {value[:_SHOWN]!r}")
    return value


def _beginning(value: Any) -> str:
    """The first characters of a value as JSON. The rest, which may be long or too deep, is not serialized."""
    text = ""
    for piece in json.JSONEncoder().iterencode(value[:_SHOWN] if isinstance(value, str) else value):
        text += piece
        if len(text) >= _SHOWN:
            break
    return text[:_SHOWN]


def _either(types: tuple[type, ...]) -> str:
    return " or ".join(_TYPE_NAMES[wanted] for wanted in types if wanted is not int or float not in types)


def _kind(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), "null")
