"""Write constraints.txt and the engine's requirements.txt from pyproject.toml (`make lock`).

constraints.txt holds every package that the project may install, anywhere: for all platforms and every Python
that it supports, with hashes. Present versions are kept; `--upgrade` takes the newest. `--check` needs no network:
it fails when pyproject.toml asks for what is not pinned, or when the files contradict each other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from pins import CONSTRAINTS, ROOT, Pin, canonical, declared, read_pins

__all__ = ["ENGINE_REQUIREMENTS", "main", "problems"]

OLDEST_PYTHON = "3.11"
ENGINE_REQUIREMENTS = {
    name: ROOT / "engine_plugin" / "engines" / name / "requirements.txt" for name in ("llamacpp", "openvino")
}
"""What an engine's InstallEngine hands to pip, by the extra that declares it."""


def compile_requirements(requirements: list[str], output: Path, arguments: list[str]) -> None:
    """Resolve with uv, for every platform. The index is the one that uv's own configuration names."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--output-file", str(output), "--quiet"]
    command += ["--universal", "--python-version", OLDEST_PYTHON, "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", *arguments]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(requirements), text=True, check=False)
    if done.returncode != 0:
        sys.exit("lock: uv found no solution, see above")


def lock(upgrade: bool) -> None:
    compile_requirements(declared(), CONSTRAINTS, ["--upgrade"] if upgrade else [])
    for extra, output in ENGINE_REQUIREMENTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            fresh = Path(scratch) / output.name
            compile_requirements(declared(extra), fresh, ["--constraints", str(CONSTRAINTS)])
            text = fresh.read_text(encoding="utf-8")
        output.write_text(text, encoding="utf-8", newline="\n")


def unmet(requirement: str, pins: list[Pin]) -> str | None:
    """Why the pins do not satisfy a requirement, None when they do."""
    wanted = Requirement(requirement)
    found = [pin for pin in pins if pin.name == canonical(wanted.name)]
    if not found:
        return f"{requirement} is not in {CONSTRAINTS.name}"
    for pin in found:
        if not wanted.specifier.contains(pin.version, prereleases=True):
            return f"{requirement} does not allow {pin.name}=={pin.version} of {CONSTRAINTS.name}"
    return None


def problems(requirements: list[str], pins: list[Pin], engines: dict[str, list[Pin]]) -> list[str]:
    """What is inconsistent between pyproject.toml, constraints.txt and the engines' requirements."""
    complaints = [text for requirement in requirements if (text := unmet(requirement, pins))]
    pinned = {(pin.name, pin.version, pin.hashes) for pin in pins}  # markers differ: an engine needs less
    for extra, own in engines.items():
        place = ENGINE_REQUIREMENTS[extra].relative_to(ROOT).as_posix()
        complaints += [f"{place} lacks {each}" for each in declared(extra) if unmet(each, own)]
        complaints += [
            f"{place}: {pin.name}=={pin.version} differs from {CONSTRAINTS.name}"
            for pin in own
            if (pin.name, pin.version, pin.hashes) not in pinned
        ]
    return complaints


def check() -> None:
    engines = {extra: read_pins(path) for extra, path in ENGINE_REQUIREMENTS.items()}
    if complaints := problems(declared(), read_pins(), engines):
        sys.exit("\n".join(["lock: run `make lock` and commit the result.", *complaints]))
    print(f"lock: {CONSTRAINTS.name} and the engines' requirements match pyproject.toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a contradiction")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    options = parser.parse_args()
    if options.check:
        check()
    else:
        lock(options.upgrade)


if __name__ == "__main__":
    main()
