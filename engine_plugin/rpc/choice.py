"""Which gRPC implementation this process uses, as server and as host."""

from __future__ import annotations

import os
from importlib.util import find_spec

from engine_plugin.errors import EnginePluginError

__all__ = ["use_grpcio"]

_VARIABLE = "ENGINE_PLUGIN_GRPC"


def use_grpcio() -> bool:
    """Whether grpcio is used: unless ENGINE_PLUGIN_GRPC is `native`.

    Raises EnginePluginError for a value other than `native` and `grpcio`, and for `native` without the package ngh2.
    """
    choice = os.environ.get(_VARIABLE, "")
    if choice not in ("", "native", "grpcio"):
        raise EnginePluginError(f"{_VARIABLE} is {choice!r}. Set it to native or grpcio, or remove it")
    if choice == "native" and find_spec("ngh2") is None:
        raise EnginePluginError(f"{_VARIABLE} is native, without ngh2. Run: pip install 'engine-plugin[native]'")
    return choice != "native"
