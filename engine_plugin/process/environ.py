"""The environment of every process that the plugin starts: the user's, without what would change how it runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["child_environ"]

# Python's own variables name modules to run (PYTHONPATH, PYTHONSTARTUP), another standard library (PYTHONHOME), or
# change what code does (PYTHONOPTIMIZE, PYTHONWARNINGS).
_NOT_FOR_CHILDREN = re.compile(r"PYTHON[A-Z0-9_]*|__PYVENV_LAUNCHER__", re.IGNORECASE)


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for a child. Proxies, certificates, the loader's settings and all else stay the user's."""
    return {name: value for name, value in environ.items() if not _NOT_FOR_CHILDREN.fullmatch(name)}
