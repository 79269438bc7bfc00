"""What a server gets for each model that it is to load: an entry, by which device and options reach the model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypedDict

from engine_plugin.engines.openvino.options import SECTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.engines.openvino.options import OpenVinoOptions
    from engine_plugin.models.store import StoredModel

__all__ = ["ModelEntry", "device_of", "devices_asked", "entry_of"]

_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}


class ModelEntry(TypedDict):
    """One model in the embedded server's config.json (docs/openvino-server.md). `options` are of MODEL_OPTIONS."""

    name: str
    kind: str
    folder: str
    device: str
    options: Mapping[str, Any]


def device_of(kind: str, mode: str, options: OpenVinoOptions, *, only_cpu: bool) -> str:
    """The device for models of this kind when the engine was started in `mode`, by OpenVINO's name.

    The section's `device` takes precedence over the mode, except that mode cpu always means CPU. `only_cpu`: OpenVINO
    has found no other device.
    """
    if mode == "cpu":
        return "CPU"
    own: str = options.of_kind(kind).get("device", "")
    return own or _DEVICES.get(mode) or options.device or ("CPU" if only_cpu else "AUTO")


def devices_asked(mode: str, options: OpenVinoOptions) -> dict[str, str]:
    """Each device that `mode` and plugin.yaml name, by the place that names it; without AUTO and combined devices
    (HETERO:GPU,CPU), which OpenVINO resolves."""
    asked: dict[str, str] = {}
    for kind, section in SECTIONS.items():
        device = device_of(kind, mode, options, only_cpu=False)
        by_kind = options.of_kind(kind).get("device") and mode != "cpu"
        where = f"engine.{section}.device" if by_kind else "mode" if mode in _DEVICES else "engine.device"
        if device != "AUTO" and ":" not in device:
            asked[where] = device
    return asked


def entry_of(model: StoredModel, device: str, options: OpenVinoOptions, *, threads: int = 0) -> ModelEntry:
    """The entry of a model. `threads`: for a server that has no setting for them; `plugin_config` may override it."""
    given = {name: value for name, value in options.of_kind(model.kind).items() if name != "device"}
    if model.kind == "chat":
        given.setdefault("max_num_seqs", options.parallel)
    if threads:
        own = json.loads(given.get("plugin_config") or "{}")
        given["plugin_config"] = json.dumps({"INFERENCE_NUM_THREADS": threads, **own})
    folder = model.path.as_posix()
    return {"name": model.name, "kind": model.kind, "folder": folder, "device": device, "options": given}
