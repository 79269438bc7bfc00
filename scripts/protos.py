"""Regenerate the protobuf stubs from protos/ (`make protos`); `--check` fails when that would change a file."""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
STUBS = ROOT / "engine_plugin" / "rpc" / "stubs"


def generate(out: Path) -> None:
    """Write the `_pb2.py` and `_pb2.pyi` of every proto below `out`."""
    sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{PROTOS}", f"-I{well_known}", f"--python_out={out}", f"--pyi_out={out}", *sources]
    if protoc.main(arguments) != 0:
        sys.exit("protos: protoc failed, see above")


def stubs_below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*_pb2.py*") if "__pycache__" not in path.parts}


def check() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        wanted, present = stubs_below(fresh), stubs_below(STUBS)
        stale = sorted(
            str(path)
            for path in wanted | present
            if path not in wanted or path not in present or not filecmp.cmp(fresh / path, STUBS / path, shallow=False)
        )
    if stale:
        sys.exit(f"protos: stubs differ from protos/: {', '.join(stale)}. Run `make protos` and commit the result.")
    print("protos: stubs match protos/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    if parser.parse_args().check:
        check()
    else:
        generate(STUBS)


if __name__ == "__main__":
    main()
