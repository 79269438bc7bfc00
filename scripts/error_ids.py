"""Write docs/errors.md: the id of every error, from engine_plugin/errors.py and engine_plugin/catalogue.py.

With `--check` it writes nothing and fails when the page is out of date.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING

from engine_plugin import errors
from engine_plugin.catalogue import CATALOGUE
from engine_plugin.errors import EnginePluginError
from pages import write_page
from pins import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["PAGE", "main", "page"]

PAGE = ROOT / "docs" / "errors.md"

_STATUS = {
    "address-taken": "not sent",
    "authentication-failed": "OK; PERMISSION_DENIED for a caller of another user",
    "deadline-exceeded": "OK; DEADLINE_EXCEEDED for a stream or a conversation",
    "manifest-invalid": "not sent",
    "plugin-process-failed": "not sent",
    "request-invalid": "OK; INVALID_ARGUMENT for SetOperateStatus and for bytes that are not a message",
}
"""How an rpc ends that fails so; all others end with OK."""

_ROOT = "The plugin failed in a way that it does not know; the message names the call."

_HEAD = """\
# Errors

Every error has an id, which programs compare, and fields, which say what it is about:
[protocol.md](protocol.md#ids-and-fields) has their form. An id keeps its meaning; new versions may add ids and
fields. For an id that it does not know, a program goes by the code. HealthCheck answers 503 whatever the reason,
with the reason's id.

Beside the fields below, an error may have `engine`, `service` and `model`. Errors marked "not sent" are raised only
by the Python host library and the command line.

"""

_GENERAL = """\
## General errors

Each is a class of `engine_plugin.errors`.

"""

_SPECIAL = """
## Errors with a section in troubleshooting.md

That section has an example of the message and all advice.

"""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _row(name: str, shown: str, kind: type[EnginePluginError], when: str, names: Sequence[str], remedy: str) -> str:
    fields = ", ".join(f"`{field}`" for field in names)
    return _line(shown, str(kind.code), _STATUS.get(name, "OK"), when, fields, remedy)


def _table(rows: Iterable[str]) -> str:
    heads = ("id", "code", "gRPC status", "when", "fields", "what to do")
    return "\n".join([_line(*heads), _line(*["---"] * len(heads)), *rows]) + "\n"


def _first(text: str) -> str:
    """The first sentence."""
    return text.replace("\n", " ").partition(". ")[0].rstrip(".") + "."


def _general() -> Iterator[str]:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, EnginePluginError) and kind.id not in CATALOGUE:
            when = _ROOT if kind is EnginePluginError else _first(inspect.cleandoc(kind.__doc__ or ""))
            yield _row(kind.id, f"`{kind.id}`", kind, when, kind.names, kind.remedy)


def _special() -> Iterator[str]:
    for entry in CATALOGUE.values():
        link = f"[`{entry.id}`](troubleshooting.md#{entry.id})"
        yield _row(entry.id, link, entry.raises, _first(entry.cause), entry.names, _first(entry.remedy))


def page() -> str:
    """The page as it should be."""
    return _HEAD + _GENERAL + _table(_general()) + _SPECIAL + _table(_special())


def main(arguments: list[str] | None = None) -> int:
    return write_page(PAGE, page(), "error_ids", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
