"""The files from which a server loads its models: config.json and, for the OpenVINO Model Server, graphs.

The embedded server reads a list of entries (docs/openvino-server.md), the OpenVINO Model Server a graph.pbtxt for
each model.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from engine_plugin.engines.openvino.options import MODEL_OPTIONS, SECTIONS
from engine_plugin.system.files import private_folder, write_json, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from filelock import BaseFileLock

    from engine_plugin.engines.openvino.options import ConfigEntry
    from engine_plugin.engines.options import Table

__all__ = ["ServedFolder", "graph_text", "lock_of", "remove_stale"]

_GRAPH = "graph.pbtxt"
_NO_LOCK = (OSError, NotImplementedError)
"""The lock is taken (filelock's Timeout is an OSError), or the file system has no locks."""


class _Calculator(NamedTuple):
    """The node of a graph that serves one kind of model, as OVMS's `--configure` writes it."""

    name: str
    node: str
    side_packets: tuple[str, ...]
    device: str = "target_device"
    stream: str = "HTTP_"
    loops: bool = False
    """Whether the node sends an answer in parts."""

    @property
    def options(self) -> str:
        """The type of its options."""
        return f"{self.name.removeprefix('Http')}Options"


_LLM = ("LLM_NODE_RESOURCES:llm", "LLM_NODE_EXECUTION_CONTEXTS:llm_ctx")
_EMBEDDINGS = ("EMBEDDINGS_NODE_RESOURCES:embeddings_servable",)
_RERANK = ("RERANK_NODE_RESOURCES:rerank_servable",)
_IMAGES = ("IMAGE_GEN_NODE_RESOURCES:pipes",)
_CALCULATORS = {
    "chat": _Calculator("HttpLLMCalculator", "LLMExecutor", _LLM, device="device", loops=True),
    "embed": _Calculator("EmbeddingsCalculatorOV", "EmbeddingsExecutor", _EMBEDDINGS, stream=""),
    "rerank": _Calculator("RerankCalculatorOV", "RerankExecutor", _RERANK, stream=""),
    "text-to-image": _Calculator("ImageGenCalculator", "ImageGenExecutor", _IMAGES, device="device"),
    "speech-to-text": _Calculator("S2tCalculator", "S2tExecutor", ("STT_NODE_RESOURCES:s2t_servable",), loops=True),
    "text-to-speech": _Calculator("T2sCalculator", "T2sExecutor", ("TTS_NODE_RESOURCES:t2s_servable",)),
}

_LOOP = """\
  input_stream_info: {
    tag_index: 'LOOPBACK:0',
    back_edge: true
  }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler",
    options {
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {
        sync_set {
          tag_index: "LOOPBACK:0"
        }
      }
    }
  }
"""


class ServedFolder:
    """The folder of one server's config.json, which is created and removed here and locked in between.

    Each graph lies in a folder of its own, which gets a new name when the graph changes: the model server looks for
    changes in config.json alone.
    """

    def __init__(self, folder: Path, *, with_graphs: bool) -> None:
        """No I/O. `with_graphs`: for the OpenVINO Model Server."""
        self.folder = folder
        self.config = folder / "config.json"
        """The file that the server reads."""
        self._with_graphs = with_graphs
        self._attempts = 0
        self._places: dict[str, str] = {}
        """The folder of each model's graph, below `folder`."""
        self._lock: BaseFileLock | None = None

    def move_graph(self, name: str) -> None:
        """Have the next `write` put a model's graph in another folder, without which OVMS retries no failed graph."""
        self._attempts += 1
        self._places[name] = f"{quote(name, safe='')}-{self._attempts}"

    def write(self, entries: Mapping[str, ConfigEntry]) -> None:
        """Write config.json for the models of these names, each of which `move_graph` was called for. Blocks."""
        if self._lock is None:
            private_folder(self.folder.parent)
            self._lock = lock_of(self.folder)
            with suppress(*_NO_LOCK):  # without locks, remove_stale leaves the folder alone as well
                self._lock.acquire(timeout=0)
        private_folder(self.folder)
        if not self._with_graphs:
            write_json(self.config, {"models": list(entries.values())}, self.folder)
            return
        listed = []
        for name, entry in entries.items():
            place = self.folder / self._places[name]
            private_folder(place)
            write_whole(place / _GRAPH, graph_text(entry).encode(), place)
            listed.append({"name": name, "base_path": str(place), "graph_path": _GRAPH})
        write_json(self.config, {"mediapipe_config_list": listed, "model_config_list": []}, self.folder)
        used = {self._places[name] for name in entries}
        for place in self.folder.iterdir():
            if place.is_dir() and place.name not in used:
                shutil.rmtree(place, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder and its lock. Blocks; called when the server has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None


def remove_stale(folder: Path) -> None:
    """Remove the servers' folders below `folder` that killed plugins have left, also of other versions. Blocks."""
    for place in folder.iterdir() if folder.is_dir() else ():
        server = place.with_suffix("")  # a folder, or the lock of one
        lock = lock_of(server)
        try:
            lock.acquire(timeout=0)
        except _NO_LOCK:
            continue  # its plugin may be alive
        shutil.rmtree(server, ignore_errors=True)
        _unlock(lock)


def lock_of(folder: Path) -> BaseFileLock:
    """The lock file beside a server's folder; its plugin's process holds the lock."""
    from filelock import FileLock

    return FileLock(folder.with_suffix(".lock"), mode=0o600, thread_local=False)


def _unlock(lock: BaseFileLock) -> None:
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def graph_text(entry: ConfigEntry) -> str:
    """The graph that serves a model, in protobuf's text format."""
    calculator = _CALCULATORS[entry["kind"]]
    into, out = (f'"{calculator.stream}{way}"' for way in ("REQUEST_PAYLOAD:input", "RESPONSE_PAYLOAD:output"))
    loopback = '"LOOPBACK:loopback"'
    lines = [f"input_stream: {into}", f"output_stream: {out}", "node: {"]
    lines += [f'  name: "{calculator.node}"', f'  calculator: "{calculator.name}"']
    if calculator.loops:
        lines += [f"  input_stream: {loopback}", f"  output_stream: {loopback}"]
    lines += [f"  input_stream: {into}", f"  output_stream: {out}"]
    lines += [f'  input_side_packet: "{packet}"' for packet in calculator.side_packets]
    lines += ["  node_options: {", f"    [type.googleapis.com / mediapipe.{calculator.options}]: {{"]
    places = {"models_path": entry["folder"], calculator.device: entry["device"]}
    lines += [f"      {name}: {_scalar(value)}" for name, value in places.items()]
    lines += [f"      {line}" for line in _fields(entry["options"], MODEL_OPTIONS[SECTIONS[entry["kind"]]])]
    lines += ["    }", "  }"]
    return "\n".join(lines) + f"\n{_LOOP if calculator.loops else ''}}}\n"


def _fields(options: Mapping[str, Any], table: Table) -> Iterator[str]:
    for name, value in options.items():
        key = table[name]
        if isinstance(key.hint, list):
            yield from (f"{name} {{ {' '.join(_fields(one, key.hint[0]))} }}" for one in value)
        elif isinstance(value, dict):
            yield f"{name} {{ {' '.join(_fields(value, key.hint))} }}"
        else:
            yield f"{name}: {value if 'choices' in key.metadata else _scalar(value)}"


def _scalar(value: Any) -> str:
    """As JSON, which is also protobuf's text format for them: true, 4, 0.5, "a text"."""
    return json.dumps(value, ensure_ascii=False)
