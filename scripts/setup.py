"""Make .venv and install the package into it: `python3 scripts/setup.py dev` (`make setup`).

Needs Python 3.11 or newer with pip (or ensurepip), and nothing else. Every package comes with the version and hash
of constraints.txt, from wherever pip's own configuration says. Run again, it does only what has become necessary.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import TYPE_CHECKING

from pins import CONSTRAINTS, ROOT, declared, project, read_pins

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LOCKING", "PROFILES", "SetupError", "fingerprint", "main", "satisfied", "set_up"]

OLDEST = (3, 11)

PROFILES = {
    "run": ("core",),
    "dev": ("core", "dev", "llamacpp", "openvino", "build"),
}
"""What each profile installs, as pyproject.toml names it; each holds the ones before it."""

LOCKING = "lock"
"""Not a profile: what pins the packages comes beside whatever is there, since others may not be pinned yet."""

INSTALLERS = ("setup", "build-system")


class SetupError(Exception):
    """A step failed; the message says what to do."""


def fingerprint() -> str:
    """A digest of all that decides what an environment holds and where it points."""
    tables = project()
    decisive = [tables[name] for name in ("build-system", "project", "dependency-groups")]
    decisive += [tables["tool"]["hatch"], PROFILES, str(ROOT), os.name]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    digest.update(CONSTRAINTS.read_bytes())
    return digest.hexdigest()


def interpreter(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp(environment: Path) -> Path:
    return environment / "engine-plugin-setup.json"


def satisfied(environment: Path, profile: str) -> bool:
    """Whether the environment already holds what a profile needs, in the state that the sources ask for."""
    try:
        done = json.loads(stamp(environment).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    enough = list(PROFILES)[list(PROFILES).index(profile) :]
    same = done.get("fingerprint") == fingerprint()
    return same and done.get("profile") in enough and interpreter(environment).exists()


def step(name: str, run: Callable[[], None]) -> None:
    """Run one step between its announcement and its seconds."""
    print(f"setup: {name} ...", end="", flush=True)
    began = time.monotonic()
    try:
        run()
    except BaseException:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - began:.1f} s", flush=True)


def quiet(command: list[str], otherwise: str) -> None:
    """Run a program and keep its output to ourselves unless it fails."""
    environ = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    done = subprocess.run(command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise SetupError(f"{output}\n\nsetup: {otherwise}")


def pip(environment: Path, *arguments: str) -> list[str]:
    return [str(interpreter(environment)), "-I", "-m", "pip", *arguments]


def create(environment: Path) -> None:
    """Make an environment with its own pinned pip.

    This Python's pip puts it there, because Debian splits ensurepip off into a package of its own. A Python
    without pip uses ensurepip.
    """
    has_pip = importlib.util.find_spec("pip") is not None
    if not has_pip and importlib.util.find_spec("ensurepip") is None:
        raise SetupError(f"setup: {sys.executable} has neither pip nor ensurepip. Install pip (Debian: python3-pip).")
    venv.create(environment, clear=True, symlinks=os.name != "nt", with_pip=not has_pip)
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "pip.txt"
        pinned.write_text("".join(pin.text for pin in read_pins() if pin.name == "pip"), encoding="utf-8")
        where = ["--python", str(interpreter(environment))] if has_pip else []
        runner = [sys.executable, "-I", "-m", "pip", *where] if has_pip else pip(environment)
        quiet([*runner, "install", "--require-hashes", "--requirement", str(pinned)], "pip could not be installed.")


def install_packages(environment: Path, *names: str) -> None:
    pinned = ["--require-hashes", "--only-binary", ":all:", "--constraint", str(CONSTRAINTS)]
    quiet(
        pip(environment, "install", *pinned, *declared(*names)),
        "a package could not be installed; pip's words are above. Wheels are needed for this platform and "
        f"Python {platform.python_version()}; another Python: make setup PYTHON=python3.13",
    )


def install(environment: Path, profile: str) -> None:
    install_packages(environment, *INSTALLERS, *PROFILES[profile])
    quiet(
        pip(environment, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)),
        "the package itself could not be installed; pip's words are above.",
    )


def usable(environment: Path) -> bool:
    """Whether an environment that is out of date can be brought up to date where it is.

    One made by another Python version, or by a Python that is gone, or half of one, cannot.
    """
    program = "import sys, pip; print(*sys.version_info[:2], sys.prefix)"
    try:
        done = subprocess.run(
            [str(interpreter(environment)), "-I", "-c", program], capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    wanted = " ".join(map(str, (*sys.version_info[:2], environment)))
    return done.returncode == 0 and done.stdout.strip() == wanted


def make_usable(environment: Path) -> None:
    if not usable(environment):
        stamp(environment).unlink(missing_ok=True)
        step(f"making {environment.name} with Python {platform.python_version()}", lambda: create(environment))


def set_up(environment: Path, profile: str) -> None:
    """Bring the environment to the state that a profile asks for; SetupError says what went wrong."""
    if profile == LOCKING:
        make_usable(environment)
        step("installing what pins packages", lambda: install_packages(environment, *INSTALLERS, LOCKING))
        return
    if satisfied(environment, profile):
        return
    began = time.monotonic()
    stamp(environment).unlink(missing_ok=True)
    make_usable(environment)
    step(f"installing what `{profile}` needs (downloads at the first time)", lambda: install(environment, profile))
    stamp(environment).write_text(json.dumps({"profile": profile, "fingerprint": fingerprint()}), encoding="utf-8")
    print(f"setup: {environment.name} is ready after {time.monotonic() - began:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "profile", nargs="?", default="dev", choices=(*PROFILES, LOCKING), help="run: to use; dev: to work on it"
    )
    parser.add_argument("--clear", action="store_true", help="make the environment anew")
    options = parser.parse_args()
    if sys.version_info[:2] < OLDEST:
        here, oldest = (".".join(map(str, version)) for version in (sys.version_info[:2], OLDEST))
        sys.exit(f"setup: Python {here} is too old, {oldest} is needed. Name one: make setup PYTHON=python3.13")
    environment = ROOT / ".venv"
    try:
        if options.clear and environment.exists():
            shutil.rmtree(environment)
        set_up(environment, options.profile)
    except SetupError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
