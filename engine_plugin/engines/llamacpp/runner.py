"""The runner for llama.cpp: `python -m engine_plugin.engines.llamacpp.runner VERB`.

    serve     serve one model over HTTP; reads the settings as a line of JSON from stdin and exits at its end
    probe     print version and devices as JSON
    inspect   print the header of a GGUF file as JSON; reads its path as a line of JSON from stdin

Of this package it imports only the guard, the templates and the reader of GGUF files. A failure is one line on stderr
and exit status 3, or 65 for a model that cannot be loaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.models.gguf import GgufError, Tensor, read_header
from engine_plugin.process import guard
from engine_plugin.process.entry import UNUSABLE, bound_memory, fail, own_stdin, read_settings
from engine_plugin.templates.jinja import LIMIT, ChatTemplate, Templates
from engine_plugin.templates.program import MEMORY, answer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from enum import IntEnum

__all__ = ["TEMPLATE_TIMEOUT", "main"]

TEMPLATE_TIMEOUT = 5
"""Seconds for rendering a model's chat templates in `inspect`; then SIGALRM ends the process."""


def _exit_at_end_of_stdin(stdin: int) -> None:
    """Exit without deleting the server, whose destructor would wait for running requests."""
    try:
        while os.read(stdin, 4096):
            pass
    finally:
        os._exit(0)


def _serve() -> None:
    stdin = own_stdin()
    settings = read_settings(stdin)
    threading.Thread(target=_exit_at_end_of_stdin, args=(stdin,), daemon=True).start()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = [settings["alias"]]  # exactly one, since answers contain the alphabetically first
    params.hostnames = [settings["host"]]
    params.port = settings["port"]
    params.api_keys = [settings["key"]]
    params.n_ctx = settings["context_length"]
    params.n_parallel = settings["parallel"]
    params.n_gpu_layers = settings["gpu_layers"]
    if settings["threads"]:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    _override_defaults(params)
    if settings["kind"] != "chat":
        params.embedding = True
        # An input must fit into one physical batch; a longer one fails with status 500.
        params.n_batch = params.n_ubatch = settings["context_length"]
        pooling = settings["pooling"]
        if pooling:
            params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling}")
    try:
        server = xllamacpp.Server(params)  # returns when the model is loaded; holds the GIL until then
    except RuntimeError as error:
        fail(f"cannot load {settings['model']}: {error}", UNUSABLE)
    else:
        print(json.dumps({"address": server.listening_address}), flush=True)
        while server is not None:  # keeps it
            threading.Event().wait()


def _override_defaults(params: Any) -> None:
    """Override the defaults of llama.cpp that do not suit a private server."""
    params.cors_origins = "localhost"
    params.ui = False
    params.offline = True
    params.endpoint_slots = True
    params.endpoint_props = False
    params.kv_unified = True  # else each slot gets only context_length / parallel
    params.n_threads_http = 64  # with the default of 6, a few streams block /health
    params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts
    params.cache_idle_slots = False  # needs the cache above
    params.sse_ping_interval = 15
    params.prefill_assistant = False  # a final assistant message is not a prefix of the answer


def _probe() -> None:
    import xllamacpp

    devices = [
        {"name": device["name"], "description": device["description"], "type": device["type"].name.rpartition("_")[2]}
        for device in xllamacpp.get_device_info()
    ]
    print(json.dumps({"version": xllamacpp.__version__, "devices": devices}))


_POOLINGS = {0: "NONE", 1: "MEAN", 2: "CLS", 3: "LAST", 4: "RANK"}


def _inspect() -> None:
    import gguf

    path = Path(read_settings(own_stdin())["path"])
    try:
        header = read_header(path)
    except (OSError, GgufError) as error:
        fail(f"not a readable GGUF file: {error}")
    value = header.values.get
    if header.parts > 1:
        fail(
            f"part {header.number('split.no') + 1} of {header.parts} of a model. Pull the first part by its path "
            f"or URL, NAME-00001-of-{header.parts:05}.gguf; the pull joins all parts"
        )
    architecture = value("general.architecture")
    if not isinstance(architecture, str):
        fail("not a model: the GGUF file has no general.architecture")
    if not header.tensors:
        fail("not a model: the GGUF file has no tensors")
    known = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    sizes = [_bytes_of(tensor, known) for tensor in header.tensors]
    end = max(header.data + tensor.offset + size for tensor, size in zip(header.tensors, sizes, strict=True))
    if end > header.size:
        fail(f"truncated: expected {end} bytes, got {header.size}")
    _try_templates([value("tokenizer.chat_template"), value("tokenizer.chat_template.tool_use")])
    biggest = header.tensors[sizes.index(max(sizes))]
    quantization = _name(gguf.LlamaFileType, value("general.file_type")).removeprefix("MOSTLY_").removeprefix("ALL_")
    print(
        json.dumps(
            {
                "architecture": architecture,
                "name": _text(value("general.name")) or "",
                "parameters": sum(tensor.elements for tensor in header.tensors),
                "quantization": quantization or _name(gguf.GGMLQuantizationType, biggest.kind),
                "context_length": header.number(f"{architecture}.context_length"),
                "embedding_length": header.number(f"{architecture}.embedding_length"),
                "pooling": _POOLINGS.get(header.number(f"{architecture}.pooling_type"), "NONE"),
                "causal": value(f"{architecture}.attention.causal") is not False,
                "chat_template": _text(value("tokenizer.chat_template")),
                "tool_template": _text(value("tokenizer.chat_template.tool_use")),
            }
        )
    )


def _try_templates(sources: list[Any]) -> None:
    """Render a word with limits, since llama.cpp does so without limits when it loads the model.

    Other failures are ignored: llama.cpp reports them.
    """
    if importlib.util.find_spec("jinja2") is None:
        return
    bound_memory(MEMORY)
    if sys.platform != "win32":
        signal.alarm(TEMPLATE_TIMEOUT)  # ends this process
    for source in filter(None, map(_text, sources)):
        template = ChatTemplate(Templates({"default": source}, {}))
        told = answer(template, [{"role": "user", "content": "a"}], [], {}, told=False)
        if told.get("kind") == LIMIT:
            fail(f"its chat template takes more than {MEMORY >> 20} MiB to render one word")
    if sys.platform != "win32":
        signal.alarm(0)


def _bytes_of(tensor: Tensor, sizes: Mapping[int, tuple[int, int]]) -> int:
    """The size of a tensor in bytes; 0 for a type unknown to the gguf package."""
    block, size = sizes.get(tensor.kind, (1, 0))
    return -(-tensor.elements // block) * size


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _name(kinds: type[IntEnum], number: Any) -> str:
    """The name of a number; "" for an unknown one."""
    try:
        return kinds(number).name
    except ValueError:
        return ""


def main(arguments: list[str]) -> int:
    """Run one verb; `serve` does not return."""
    verbs = {"serve": _serve, "probe": _probe, "inspect": _inspect}
    if len(arguments) != 1 or arguments[0] not in verbs:
        sys.stderr.write(f"usage: runner {'|'.join(verbs)}\n")
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the plugin handles Ctrl-C
    guard.arm()
    try:
        verbs[arguments[0]]()
    except ImportError as error:
        fail(f"{error}. Call InstallEngine, or run: pip install 'engine-plugin[llamacpp]'")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
