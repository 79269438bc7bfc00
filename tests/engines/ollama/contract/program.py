"""The contract server as a program; see the package for its arguments."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import dataclass

__all__ = ["Options", "main"]

_VERSION = "0.33.1"


@dataclass(frozen=True)
class Options:
    """Options that deviate from Ollama's defaults."""

    version: str
    bare: bool
    runners: bool
    until_stdin_ends: bool
    device: str


def main(argv: list[str]) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(prog="ollama")
    parser.add_argument("command", nargs="?", choices=("serve",))
    parser.add_argument("--version", "-v", action="store_true")
    parser.add_argument("--be-version", default=_VERSION)
    parser.add_argument("--bare", action="store_true", help="begin without models")
    parser.add_argument("--runners", action="store_true", help="a process for each loaded model")
    parser.add_argument("--until-stdin-ends", action="store_true")
    parser.add_argument("--device", default="", help="compute on CUDA, unless it is hidden, or on Metal")
    parser.add_argument("--fail", default="", help="exit with this error instead of serving")
    given = parser.parse_args(argv)
    if given.version:
        print("Warning: could not connect to a running Ollama instance")
        print(f"Warning: client version is {given.be_version}")
        return 0
    if given.command != "serve":
        parser.print_help()
        return 0
    if given.fail:
        print(f"Error: {given.fail}", file=sys.stderr)
        return 1
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "-1"
    device = given.device if given.device and not (hidden and given.device == "CUDA") else "cpu"
    options = Options(given.be_version, given.bare, given.runners, given.until_stdin_ends, device)
    from .serving import serve  # imported late: this takes most of the start

    return asyncio.run(serve(options))
