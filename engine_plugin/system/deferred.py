"""Modules of others that are loaded when they are used, not when they are imported, for a quick start."""

from __future__ import annotations

import sys
from _thread import RLock
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

TYPE_CHECKING = False  # `typing` is slow
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import Any

__all__ = ["UNUSED", "defer"]

UNUSED = (
    "asyncio.sslproto",
    "asyncio.staggered",
    "calendar",
    "ctypes",
    "difflib",
    "google.protobuf.descriptor_database",
    "google.protobuf.internal.python_message",
    "hashlib",
    "ipaddress",
    "locale",
    "psutil",
    "shutil",
    "ssl",
    "tempfile",
    "textwrap",
    "tokenize",
    "yaml",
    "zipfile",
)
"""What the standard library, protobuf and this package import and a plugin that starts does not use."""


_locks: dict[str, RLock] = {}
_unloaded: set[str] = set()


class _Deferred(ModuleType):
    """A module that is not loaded yet. (`importlib.util.LazyLoader` loads at the next `import` statement.)

    Until all of it is loaded, other threads wait here for the attributes that it lacks.
    """

    def __getattr__(self, name: str) -> Any:
        module, spec = self.__name__, self.__spec__
        with _locks[module]:
            if module in _unloaded and spec is not None and spec.loader is not None:
                _unloaded.remove(module)
                try:
                    spec.loader.exec_module(self)
                except BaseException:  # the next use fails with the same error
                    _unloaded.add(module)
                    raise
                object.__setattr__(self, "__class__", ModuleType)
        return ModuleType.__getattribute__(self, name)


def defer(*names: str) -> None:
    """Make later imports of these modules load nothing until an attribute of the module is used.

    Called by a program before its other imports. What is loaded already, or not installed, stays as it is.
    """
    for name in names:
        if name not in sys.modules and (spec := _found(name)):
            module = module_from_spec(spec)
            module.__class__ = _Deferred
            _locks[name] = RLock()
            _unloaded.add(name)
            sys.modules[name] = module


def _found(name: str) -> ModuleSpec | None:
    """Find a module without importing the packages that it is in, as `importlib.util.find_spec` would."""
    spec, path, parts = None, None, name.split(".")
    for count in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[: count + 1]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec
