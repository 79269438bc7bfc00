"""Which gRPC implementation this process uses, as server and as host."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from engine_plugin.errors import EnginePluginError

__all__ = ["use_grpcio"]

_VARIABLE = "ENGINE_PLUGIN_GRPC"
_PACKAGES = {"native": "ngh2", "grpcio": "grpc"}


def use_grpcio() -> bool:
    """Whether grpcio is used: if ENGINE_PLUGIN_GRPC is `grpcio`, or is not set and ngh2 is not installed.

    Raises EnginePluginError for a value other than `native` and `grpcio`, and for a choice that is not installed.
    """
    choice = os.environ.get(_VARIABLE) or ("grpcio" if find_spec("ngh2") is None else "native")
    package = _PACKAGES.get(choice)
    if package is None:
        raise EnginePluginError(f"{_VARIABLE} is {choice!r}. Set it to native or grpcio, or remove it")
    if find_spec(package) is None:
        raise EnginePluginError(
            f"the {choice} implementation of gRPC needs a package that is not installed. "
            f"Run: {sys.executable} -m pip install {'ngh2' if choice == 'native' else 'grpcio'}"
        )
    return choice == "grpcio"
