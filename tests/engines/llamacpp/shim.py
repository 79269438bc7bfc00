"""A stand-in for the llama-server binary, with the arguments that the plugin passes and llama.cpp's own server.

Unknown arguments are rejected, as by the real one.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from typing import NoReturn


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    for name in ("--model", "--alias", "--api-key-file", "--host", "--pooling"):
        parser.add_argument(name, default="")
    for name in ("--port", "--ctx-size", "--parallel", "--threads-http", "--cache-ram", "--batch-size"):
        parser.add_argument(name, type=int, default=0)
    for name in ("--ubatch-size", "--threads", "--n-gpu-layers"):
        parser.add_argument(name, type=int, default=-1)
    for name in ("--no-webui", "--offline", "--kv-unified", "--slots", "--jinja", "--no-prefill-assistant"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--embedding", action="store_true")
    return parser.parse_args()


def main() -> NoReturn:
    options = parse()
    if options.version:
        sys.stderr.write("version: 1234 (abc)\nbuilt with a Python for tests\n")
        sys.exit(0)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.model_alias = [options.alias]
    params.hostnames = [options.host]
    params.port = options.port
    params.api_keys = [Path(options.api_key_file).read_text().strip()]
    params.n_ctx = options.ctx_size
    params.n_parallel = options.parallel
    params.n_threads_http = options.threads_http
    params.cache_ram_mib = options.cache_ram
    params.kv_unified = options.kv_unified
    params.ui = not options.no_webui
    params.prefill_assistant = not options.no_prefill_assistant
    params.cpuparams.n_threads = options.threads
    params.embedding = options.embedding
    if options.batch_size:
        params.n_batch, params.n_ubatch = options.batch_size, options.ubatch_size
    if options.pooling:
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{options.pooling.upper()}")
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        sys.stderr.write(f"0.00.001 E srv  main: {error}\n")
        sys.exit(1)
    while server is not None:
        threading.Event().wait()
    sys.exit(0)


if __name__ == "__main__":
    main()
