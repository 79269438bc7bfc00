"""Regenerate the protobuf stubs from protos/ (`make protos`); `--check` fails when that would change a file.

The Python stubs are the package's own. `--go` generates those of the conformance host as well, which needs Go:
the generators are tools of that host's own module, so their versions are pinned there.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc_tools
from grpc_tools import protoc

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GO", "PYTHON", "Target", "main", "stale"]

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GO_HOST = ROOT / "tests" / "conformance" / "host"
GO_MODULE = "engineplugin.invalid/conformance"
GO_GENERATORS = (
    "google.golang.org/protobuf/cmd/protoc-gen-go",
    "google.golang.org/grpc/cmd/protoc-gen-go-grpc",
)
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


@dataclass(frozen=True)
class Target:
    """One language's stubs: where they are committed, which files they are, and what writes them below a folder."""

    name: str
    committed: Path
    pattern: str
    generate: Callable[[Path], None]


def run_protoc(arguments: list[str], sources: list[Path]) -> None:
    command = ["protoc", *arguments, f"-I{PROTOS}", f"-I{WELL_KNOWN}", *map(str, sources)]
    if protoc.main(command) != 0:
        sys.exit("protos: protoc failed, see above")


def generate_python(out: Path) -> None:
    """Write the `_pb2.py` and `_pb2.pyi` of every proto below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    sources = sorted(PROTOS.rglob("*.proto"))
    run_protoc([f"--python_out={out}", f"--pyi_out={out}"], sources)


def generate_go(out: Path) -> None:
    """Write the Go stubs of the provider's protocol below `out`; go-plugin brings those of its own services."""
    go = shutil.which("go")
    if go is None:
        sys.exit("protos: --go needs Go on PATH")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = []
        for package in GO_GENERATORS:
            kind = package.rpartition("protoc-gen-")[2]
            generator = Path(scratch) / (f"protoc-gen-{kind}" + (".exe" if os.name == "nt" else ""))
            command = [go, "build", "-mod=readonly", "-o", str(generator), package]
            subprocess.run(command, cwd=GO_HOST, check=True)
            arguments += [
                f"--plugin=protoc-gen-{kind}={generator}",
                f"--{kind}_out={out}",
                f"--{kind}_opt=module={GO_MODULE}/protocol",
            ]
        run_protoc(arguments, [PROTOS / "provider.proto"])


PYTHON = Target("Python", ROOT / "engine_plugin" / "protocol" / "stubs", "*_pb2.py*", generate_python)
GO = Target("Go", GO_HOST / "protocol", "*.pb.go", generate_go)


def stubs_below(folder: Path, pattern: str) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob(pattern) if "__pycache__" not in path.parts}


def stale(target: Target, committed: Path | None = None) -> list[str]:
    """The stubs in `committed` (the repository's by default) which a fresh generation adds, drops or changes."""
    present_in = target.committed if committed is None else committed
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        target.generate(fresh)
        wanted, present = stubs_below(fresh, target.pattern), stubs_below(present_in, target.pattern)
        same = {path for path in wanted & present if filecmp.cmp(fresh / path, present_in / path, shallow=False)}
    return sorted(str(path) for path in (wanted | present) - same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    parser.add_argument("--go", action="store_true", help="the conformance host's Go stubs too")
    options = parser.parse_args()
    for target in (PYTHON, GO) if options.go else (PYTHON,):
        if not options.check:
            target.generate(target.committed)
        elif different := stale(target):
            sys.exit(
                f"protos: {target.name} stubs differ from protos/: {', '.join(different)}. "
                "Run `make protos` and commit the result."
            )
        else:
            print(f"protos: {target.name} stubs match protos/")


if __name__ == "__main__":
    main()
