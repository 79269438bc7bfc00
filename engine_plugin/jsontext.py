"""JSON from outside: limits of size and depth, and the replacement of invalid characters.

`read_json` reads JSON from hosts and files; `answer_object` and `json_object` read the answers of engines and
plugins, whose size their readers limit; `write_json` writes JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
from json import scanner
from json.decoder import JSONArray, JSONObject  # type: ignore[attr-defined]  # typeshed leaves them out
from typing import Any, NoReturn

from engine_plugin.errors import BadGatewayError, InvalidRequestError

__all__ = [
    "BRIEF",
    "MOST_BYTES",
    "MOST_DEPTH",
    "MOST_MESSAGE",
    "MOST_VALUES",
    "REPLACEMENT",
    "JsonError",
    "answer_object",
    "json_object",
    "read_json",
    "write_json",
    "write_request",
]

MOST_BYTES = 256 << 20
"""The most bytes of one text: an hour of 16 kHz WAV in base64 is 154 MB."""

MOST_DEPTH = 100
"""The deepest nesting of objects and lists."""

MOST_VALUES = 1_000_000
"""The most values in one text. A value takes up to a hundred bytes of memory, however short its text."""

BRIEF = 64 << 10
"""Bytes that take less than 10 ms to parse in any case. Longer texts are parsed in a thread."""

MOST_MESSAGE = MOST_BYTES + BRIEF
"""The most bytes of a gRPC message with such a text and the fields beside it."""

_SHOWN = 60
_ANSWER_SHOWN = 200
_LONG = 1 << 20
_ESCAPED = bytes(range(32)) + b'"\\'
"""The characters that a JSON string must escape."""
_ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_HALVES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"
"""Replaces half of a surrogate pair; a name with it is not the intended name."""


class JsonError(ValueError):
    """The text is not acceptable JSON. The message is the predicate of a sentence."""


def read_json(data: bytes, most_bytes: int = MOST_BYTES) -> Any:
    """Parse a JSON text in UTF-8, with or without a byte order mark. Raises JsonError.

    Half of a surrogate pair, which JSON can escape and text cannot hold, becomes U+FFFD. Parse a text longer than
    BRIEF in a thread: the parser is then in Python, which lets other threads run between two values.
    """
    if len(data) > most_bytes:
        limit = f"{most_bytes >> 20} MiB" if most_bytes >> 20 else f"{most_bytes >> 10} KiB"
        raise JsonError(f"has {len(data)} bytes; the limit is {limit}")
    try:
        # Decoded here: json.loads would guess at UTF-16 and let surrogates in UTF-8 pass.
        value = (_BRIEF_DECODER if len(data) <= BRIEF else _LongDecoder()).decode(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise JsonError(f"is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _too_deep() from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"is not JSON: {error}") from None
    return _whole(value) if _ESCAPED_HALF.search(data) else value


def json_object(data: bytes | str) -> dict[str, Any] | None:
    """The JSON object in `data`; None for anything else."""
    try:
        shape = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return shape if isinstance(shape, dict) else None


def answer_object(answer: bytes, what: str = "the server's answer") -> dict[str, Any]:
    """The JSON object in an answer. Raises BadGatewayError, beginning with `what`, for anything else."""
    shape = json_object(answer)
    if shape is None:
        raise BadGatewayError(f"{what} is not a JSON object: {answer[:_ANSWER_SHOWN]!r}")
    return shape


def write_json(value: Any) -> bytes:
    """The value as JSON in UTF-8, with only the necessary escapes; half a surrogate pair becomes U+FFFD."""
    text = _ENCODER.encode(value)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _HALVES.sub(REPLACEMENT, text).encode()


def write_request(value: Any) -> bytes:
    """Like `write_json`, for values with pictures or sound in base64: long texts without escapes are copied, since
    the encoder would block other threads for a second per 100 MB.

    Raises InvalidRequestError for too deep a nesting.
    """
    long: dict[bytes, bytes] = {}
    try:
        data = write_json(_set_apart(value, long) if _has_long(value) else value)
    except RecursionError:
        raise InvalidRequestError.at("request_data", "is nested too deeply") from None
    if not long:
        return data
    pieces: list[bytes] = []
    for mark, text in long.items():
        before, _, data = data.partition(mark)
        pieces += (before, text)
    return b"".join([*pieces, data])


def _has_long(value: Any) -> bool:
    """Whether there is a long text anywhere in `value`."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            if len(item) >= _LONG:
                return True
        elif isinstance(item, dict):
            rest += item.values()
        elif isinstance(item, list):
            rest += item
    return False


def _set_apart(value: Any, long: dict[bytes, bytes]) -> Any:
    """Replace each long plain text by a mark and append the text to `long`."""
    if isinstance(value, str):
        if len(value) < _LONG or not value.isascii():
            return value
        text = value.encode()
        if len(text.translate(None, _ESCAPED)) < len(text):
            return value
        mark = os.urandom(16).hex()
        long[mark.encode()] = text
        return mark
    if isinstance(value, dict):
        return {name: _set_apart(item, long) for name, item in value.items()}
    return [_set_apart(item, long) for item in value] if isinstance(value, list) else value


def _too_deep() -> JsonError:
    return JsonError(f"is nested more than {MOST_DEPTH} deep")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # it could not be serialized again
        raise ValueError(f"{digits[:_SHOWN]} is too large a number")
    return number


class _BriefDecoder(json.JSONDecoder):
    """Parse with the standard library's decoder in C, then check the depth."""

    def __init__(self) -> None:
        super().__init__(parse_constant=_refuse_constant, parse_float=_finite)

    def decode(self, s: str, *args: Any) -> Any:
        value = super().decode(s, *args)
        if s.count("[") + s.count("{") > MOST_DEPTH:
            _check_depth(value)
        return value


_BRIEF_DECODER = _BriefDecoder()
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


class _LongDecoder(json.JSONDecoder):
    """Parse with the standard library's decoder in Python, and count values and depth on the way.

    The decoder in C would block every other thread until the end: half a second for a million lists.
    """

    def __init__(self) -> None:
        super().__init__(parse_constant=_refuse_constant, parse_float=_finite)
        self._values = self._depth = 0
        self.parse_object = self._object
        self.parse_array = self._array
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]  # likewise

    def _object(self, place: Any, strict: bool, scan_once: Any, *rest: Any) -> Any:
        return self._nested(JSONObject, place, strict, self._counted(scan_once), *rest)

    def _array(self, place: Any, scan_once: Any, *rest: Any) -> Any:
        return self._nested(JSONArray, place, self._counted(scan_once), *rest)

    def _nested(self, read: Any, *arguments: Any) -> Any:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _too_deep()
        found = read(*arguments)
        self._depth -= 1
        return found

    def _counted(self, scan_once: Any) -> Any:
        def scan(text: str, place: int) -> Any:
            self._values += 1
            if self._values > MOST_VALUES:
                raise JsonError(f"holds more than {MOST_VALUES} values")
            return scan_once(text, place)

        return scan


def _whole(value: Any) -> Any:
    """The value without halves of surrogate pairs."""
    if isinstance(value, str):
        return _HALVES.sub(REPLACEMENT, value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    return value
