"""The archive for a machine, and the errors for machines that cannot run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.openvino.releases import Machine, missing_library, release_archive
from engine_plugin.errors import InstallError

if TYPE_CHECKING:
    from pathlib import Path

BASE = "https://github.com/openvinotoolkit/model_server/releases/download"


@pytest.mark.parametrize(
    ("version", "flavour", "with_python", "place"),
    [
        ("2026.3", "ubuntu24", True, "v2026.3/ovms_ubuntu24_2026.3.0_python_on.tar.gz"),
        ("2026.3.0", "ubuntu22", False, "v2026.3/ovms_ubuntu22_2026.3.0_python_off.tar.gz"),
        ("v2026.2.1", "redhat", True, "v2026.2.1/ovms_redhat_2026.2.1_python_on.tar.gz"),
        ("2026.1", "windows", True, "v2026.1/ovms_windows_2026.1.0_python_on.zip"),
    ],
)
def test_archive_has_the_name_of_the_release(version: str, flavour: str, with_python: bool, place: str) -> None:
    archive = release_archive(version, flavour, "", "", with_python=with_python)
    assert archive.url == f"{BASE}/{place}"
    assert (archive.os, archive.arch) == ("windows" if flavour == "windows" else "linux", "amd64")
    tag = place.partition("/")[0]
    assert archive.checksums == f"https://api.github.com/repos/openvinotoolkit/model_server/releases/tags/{tag}"
    mirrored = release_archive(version, flavour, "https://m.example/x/", "", with_python=with_python)
    assert (mirrored.url, mirrored.checksums) == (
        f"https://m.example/x/{place}",
        f"https://m.example/x/{tag}/SHA256SUMS",
    )
    assert release_archive(version, flavour, "", "/sums", with_python=with_python).checksums == "/sums"


@pytest.mark.parametrize("version", ["2026.0", "2025.4.1", "b1234", "2026", "2026.3/../x"])
def test_unknown_version_is_rejected(version: str) -> None:
    with pytest.raises(InstallError, match=r"engine\.version: .* from 2026\.1 on"):
        release_archive(version, "ubuntu24", "", "", with_python=True)


@pytest.mark.parametrize(
    ("glibc", "distributions", "flavour"),
    [
        ((2, 35), {"ubuntu", "debian"}, "ubuntu22"),
        ((2, 39), {"ubuntu", "debian"}, "ubuntu24"),
        ((2, 43), {"ubuntu", "debian"}, "ubuntu24"),
        ((2, 36), {"debian"}, "ubuntu22"),
        ((2, 41), {"debian"}, "ubuntu24"),
        ((2, 34), {"rhel", "fedora"}, "redhat"),
        ((2, 39), {"fedora"}, "redhat"),
        ((2, 34), {"arch"}, "redhat"),
    ],
)
def test_flavour_fits_the_machine(glibc: tuple[int, int], distributions: set[str], flavour: str) -> None:
    machine = Machine("linux", "x86_64", glibc, frozenset(distributions))
    assert machine.flavour() == flavour


def test_machine_without_a_release_is_reported() -> None:
    assert Machine("win32", "amd64").flavour() == "windows"
    for machine in (Machine("darwin", "arm64"), Machine("linux", "aarch64", (2, 39))):
        with pytest.raises(InstallError, match=r"there is no release .* Set engine\.backend to embedded"):
            machine.flavour()
    with pytest.raises(InstallError, match=r"needs glibc 2\.34 or newer; this machine has 2\.31"):
        Machine("linux", "x86_64", (2, 31), frozenset({"debian"})).flavour()
    with pytest.raises(InstallError, match=r"this machine has 0\.0"):
        Machine("linux", "x86_64").flavour()  # musl


def test_python_library_of_an_archive_is_detected(tmp_path: Path) -> None:
    machine = Machine("linux", "x86_64", (2, 39), libraries=(tmp_path / "a", tmp_path / "b"))
    assert not machine.has_python_for("ubuntu24")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "libpython3.12.so.1.0").touch()
    assert machine.has_python_for("ubuntu24")
    assert machine.has_python_for("redhat")
    assert not machine.has_python_for("ubuntu22")
    assert machine.has_python_for("windows"), "it is in the archive"


def test_this_machine_is_described(tmp_path: Path) -> None:
    machine = Machine.this({"LD_LIBRARY_PATH": f"{tmp_path}:"})
    assert machine.libraries[0] == tmp_path
    assert machine.processor


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("libxml2.so.2", "libxml2.so.2 is missing on this machine. Install the package libxml2 (Debian"),
        ("libpython3.10.so.1.0", "Install libpython3.10 (Debian, Ubuntu) or python3.10-libs (Red Hat), or set"),
        ("libfoo.so.7", "libfoo.so.7 is missing on this machine. Install the package that has it"),
    ],
)
def test_missing_library_is_reported_with_its_package(words: str, advice: str) -> None:
    said = f"ovms: error while loading shared libraries: {words}: cannot open shared object file: No such file"
    assert advice in missing_library(said)


def test_too_old_system_is_reported() -> None:
    said = "ovms: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by ovms)"
    assert missing_library(said) == (
        "it needs GLIBC_2.38, and this system is older. Choose another engine.ovms_flavour"
    )
    assert missing_library("error parsing options") == ""
