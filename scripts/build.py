"""Write plugin directories that a host spawns as they stand (`make build`): dist/plugins/<provider.name>/.

    plugin.yaml                    the manifest
    bin/<platform>/<executable>    the launcher, where the manifest says
    lib/                           the package and what it needs, at the pinned versions

A directory may be moved or copied, also to a path with spaces. It needs a Python of the minor version that built it:
the one that ENGINE_PLUGIN_PYTHON names, else the one that built it, else `python3.X` on PATH.

`--linked` writes the same with this checkout and this interpreter in the place of lib/'s packages, in a moment: for
tests, and to see a change at work in a host. `--platform windows_amd64` builds for another platform than this one.
A directory appears whole or not at all, and replaces what was there.

On POSIX the launcher becomes Python. Windows has no exec: there the launcher, which is distlib's, starts Python in a
job that ends with it. That was not tried on Windows yet; the program inside the launcher was, elsewhere.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from engine_plugin.errors import ManifestError
from engine_plugin.manifest import Manifest, load_manifest, platform_key, write_parsed
from pins import CONSTRAINTS, ROOT, declared, read_pins

__all__ = ["BuildError", "build", "build_linked", "main", "manifests"]

TEMPLATES = ROOT / "scripts" / "launcher"
START = PurePosixPath("lib/start_plugin.py")
# A copy of the manifest, which is valid, and its content: while plugin.yaml is the same, the plugin announces itself
# before it loads, and needs no YAML parser.
CHECKED, PARSED = "checked-plugin.yaml", "checked-plugin.json"
MINOR = "{}.{}".format(*sys.version_info[:2])
# Isolated from the user's Python settings; and, when everything is in lib/, from that Python's other packages.
LINKED_FLAGS = "-I -X utf8"
FLAGS = "-I -S -B -X utf8"

WHEELS = {
    "linux_amd64": ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"),
    "linux_arm64": ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"),
    "darwin_amd64": ("macosx_11_0_x86_64", "macosx_11_0_universal2"),
    "darwin_arm64": ("macosx_11_0_arm64", "macosx_11_0_universal2"),
    "windows_amd64": ("win_amd64",),
}
"""The wheels that fit a platform other than this one, by pip's names."""


class BuildError(Exception):
    """A plugin directory could not be written; nothing has changed."""


@dataclass(frozen=True)
class Plan:
    """What is built: a manifest for a platform. `linked` to this checkout, else complete."""

    manifest: Manifest
    platform: str
    linked: bool

    @property
    def name(self) -> str:
        return self.manifest.provider.name

    @property
    def executable(self) -> PurePosixPath:
        """The launcher, seen from the plugin directory."""
        declared_here = self.manifest.platforms.get(self.platform)
        if declared_here is None:
            raise BuildError(f"{self.manifest.path}: platforms has no {self.platform}. Add it, with its executable.")
        return PurePosixPath(declared_here.executable)

    @property
    def interpreter(self) -> str:
        """The Python that the launcher tries first; "" for none known."""
        if self.linked:
            return sys.executable
        return os.path.realpath(sys.executable) if self.platform == platform_key() else ""


def manifests() -> list[Path]:
    """The manifests of this repository: the default plugin's and those in plugins/."""
    return [ROOT / "plugin.yaml", *sorted(ROOT.glob("plugins/*/plugin.yaml"))]


def template(name: str, **values: str) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        output = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise BuildError(f"{output}\n\n{' '.join(command[:5])} … failed, see above.")


def pip(*arguments: str) -> None:
    run([sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", *arguments])


def elsewhere(platform: str, scratch: Path) -> list[str]:
    """pip's arguments for a platform other than this one.

    pip evaluates markers for the machine that it runs on, so what only Windows needs is asked for by name.
    """
    arguments = ["--python-version", MINOR, "--implementation", "cp"]
    arguments += [part for tag in WHEELS[platform] for part in ("--platform", tag)]
    if platform.startswith("windows"):
        pins = [pin for pin in read_pins() if pin.marker == "sys_platform == 'win32'"]
        hashed = [
            " ".join([f"{pin.name}=={pin.version}", *(f"--hash={each}" for each in pin.hashes)]) for pin in pins
        ]
        requirements = scratch / "windows.txt"
        requirements.write_text("\n".join(hashed), encoding="utf-8")
        arguments += ["--requirement", str(requirements)]
    return arguments


def fill_lib(lib: Path, platform: str) -> None:
    """Put the package and its dependencies into lib/."""
    arguments = ["--target", str(lib), "--no-compile", "--require-hashes", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if platform != platform_key():
            arguments += elsewhere(platform, scratch)
        pip("install", *arguments, "--constraint", str(CONSTRAINTS), *declared("core"))
        shutil.rmtree(lib / "bin", ignore_errors=True)  # scripts with this machine's paths in them
        pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, str(ROOT))
        for wheel in scratch.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(lib)


def compile_lib(lib: Path) -> None:
    """Compile so that the files' times do not matter: copying must not make them stale.

    Without columns for tracebacks, which take time to load and memory.
    """
    command = [sys.executable, "-I", "-X", "no_debug_ranges", "-m", "compileall", "-q", "-j", "0"]
    command += ["--invalidation-mode", "unchecked-hash"]
    run([*command, "-s", str(lib), str(lib)])


def write_launcher(plan: Plan, root: Path) -> None:
    executable = root / plan.executable
    executable.parent.mkdir(parents=True)
    start = str(PurePosixPath(*[".."] * (len(plan.executable.parts) - 1)) / START)
    flags = LINKED_FLAGS if plan.linked else FLAGS
    if plan.platform.startswith("windows"):
        write_windows_launcher(executable, start, plan.interpreter, flags)
        return
    script = template(
        "launcher.sh", NAME=plan.name, START=start, PYTHON=shlex.quote(plan.interpreter), MINOR=MINOR, FLAGS=flags
    )
    executable.write_text(script, encoding="utf-8", newline="\n")
    executable.chmod(0o755)


def write_windows_launcher(executable: Path, start: str, interpreter: str, flags: str) -> None:
    """distlib's program for console scripts, which runs what follows it: a line that names Python, then a zip."""
    python = f'"{interpreter}"' if interpreter else "/usr/bin/env python"  # the program looks for the latter on PATH
    program = io.BytesIO()
    with zipfile.ZipFile(program, "w") as archive:
        archive.writestr("__main__.py", template("windows_main.py", START=start.replace("/", "\\")))
    stub = resources.files("distlib").joinpath("t64.exe").read_bytes()
    executable.write_bytes(stub + f"#!{python} {flags}\r\n".encode() + program.getvalue())


def write_plugin(plan: Plan, root: Path) -> None:
    """Write the whole directory at `root`."""
    lib = root / START.parent
    lib.mkdir(parents=True)
    root.chmod(0o755)
    if plan.linked:
        packages = str(ROOT)
    else:
        packages = "."
        fill_lib(lib, plan.platform)
        shutil.copy(ROOT / "LICENSE", root)
    (root / START).write_text(template(START.name, MINOR=MINOR, PACKAGES=packages), encoding="utf-8", newline="\n")
    if not plan.linked:
        compile_lib(lib)
    write_launcher(plan, root)
    shutil.copy(plan.manifest.path, root)
    shutil.copy(plan.manifest.path, lib / CHECKED)
    write_parsed(plan.manifest.path, lib / PARSED)


def switch(fresh: Path, target: Path, scratch: Path) -> None:
    """Put a finished directory in the place of the present one, which comes back when that fails."""
    retired = scratch / "retired"
    present = target.exists()
    if present:
        target.rename(retired)
    try:
        fresh.rename(target)
    except OSError:
        if present:
            retired.rename(target)
        raise


def carry_out(plan: Plan, output: Path) -> Path:
    """Build beside the target, one level deeper than hosts look for manifests, and switch."""
    output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=output))
    try:
        fresh, target = scratch / plan.name, output / plan.name
        write_plugin(plan, fresh)
        switch(fresh, target, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def build(manifest: Path, output: Path, platform: str = "") -> Path:
    """Write the complete plugin directory of a manifest below `output` and return it."""
    return carry_out(Plan(load_manifest(manifest), platform or platform_key(), linked=False), output)


def build_linked(manifest: Path, output: Path) -> Path:
    """Write a plugin directory that runs this checkout with this interpreter. The demo and the tests use it."""
    try:
        importlib.metadata.version("engine-plugin")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError(f"engine-plugin is not installed for {sys.executable}. Run `make setup`.") from None
    return carry_out(Plan(load_manifest(manifest), platform_key(), linked=True), output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("manifest", nargs="*", type=Path, help="default: plugin.yaml and plugins/*/plugin.yaml")
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "plugins", help="default: dist/plugins")
    parser.add_argument("--linked", action="store_true", help="run this checkout, for development")
    parser.add_argument("--platform", default=platform_key(), choices=sorted(WHEELS), help="default: this machine's")
    options = parser.parse_args()
    for manifest in options.manifest or manifests():
        began = time.monotonic()
        try:
            if options.linked:
                target = build_linked(manifest, options.output)
            else:
                target = build(manifest, options.output, options.platform)
        except (BuildError, ManifestError, OSError) as error:
            sys.exit(f"build: {error}")
        print(f"build: {target} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
