"""The archives of Ollama's releases."""

from __future__ import annotations

import pytest

from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.releases import RELEASE, release_archives
from engine_plugin.errors import InstallError
from engine_plugin.install.releases import select_archives

HUB = "https://github.com/ollama/ollama/releases/download"


@pytest.mark.parametrize(
    ("platform", "accelerator", "names"),
    [
        ("linux_amd64", "cpu", ["ollama-linux-amd64.tar.zst"]),
        ("linux_amd64", "cuda", ["ollama-linux-amd64.tar.zst"]),
        ("linux_amd64", "rocm", ["ollama-linux-amd64.tar.zst", "ollama-linux-amd64-rocm.tar.zst"]),
        ("linux_arm64", "cpu", ["ollama-linux-arm64.tar.zst"]),
        ("linux_arm64", "jetpack6", ["ollama-linux-arm64.tar.zst", "ollama-linux-arm64-jetpack6.tar.zst"]),
        ("darwin_arm64", "auto", ["ollama-darwin.tgz"]),
        ("darwin_amd64", "auto", ["ollama-darwin.tgz"]),
        ("windows_amd64", "auto", ["ollama-windows-amd64.zip"]),
        ("windows_amd64", "rocm", ["ollama-windows-amd64.zip", "ollama-windows-amd64-rocm.zip"]),
        ("windows_arm64", "cpu", ["ollama-windows-arm64.zip"]),
    ],
)
def test_archives_of_each_machine(platform: str, accelerator: str, names: list[str]) -> None:
    chosen = select_archives(release_archives(RELEASE, "", ""), accelerator, platform)
    assert [entry.url for entry in chosen] == [f"{HUB}/v{RELEASE}/{name}" for name in names]
    assert {entry.checksums for entry in chosen} == {f"{HUB}/v{RELEASE}/sha256sum.txt"}


def test_older_releases_have_other_suffixes() -> None:
    [entry] = select_archives(release_archives("0.13.5", "", ""), "cpu", "linux_amd64")
    assert entry.url == f"{HUB}/v0.13.5/ollama-linux-amd64.tgz"


def test_mirror_and_checksums_replace_the_defaults() -> None:
    [entry] = select_archives(
        release_archives("v0.33.0-rc1", "https://host/olla/", "/srv/sums"), "cpu", "linux_arm64"
    )
    assert entry.url == "https://host/olla/v0.33.0-rc1/ollama-linux-arm64.tar.zst"
    assert entry.checksums == "/srv/sums"


@pytest.mark.parametrize("version", ["0.5.13", "latest", "", "0.32", "b1234", "../../0.32.15"])
def test_invalid_version_is_rejected(version: str) -> None:
    with pytest.raises(
        InstallError, match=r"engine\.version: .* is not a supported release of Ollama.* such as 0\.\d+\.\d+"
    ):
        release_archives(version, "", "")


def test_missing_archive_for_accelerator_is_reported() -> None:
    with pytest.raises(InstallError, match=r"no archive for rocm on linux_arm64\. Set one of cpu, cuda, jetpack5"):
        select_archives(release_archives(RELEASE, "", ""), "rocm", "linux_arm64")


def test_pinned_release_satisfies_minimum_version() -> None:
    wanted = tuple(map(int, OllamaOptions().minimum_version.split(".")))
    assert tuple(map(int, RELEASE.split("."))) >= wanted
