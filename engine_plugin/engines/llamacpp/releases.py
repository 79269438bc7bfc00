"""The archives of llama.cpp's releases.

Since about release b7800 each is a .tar.gz, on Windows a .zip. Older releases use other names, and the versions of
CUDA and ROCm in the names change: `engine.archives` can name other archives.
"""

from __future__ import annotations

from engine_plugin.install.releases import Archive

__all__ = ["release_archives"]

_DOWNLOADS = "https://github.com/ggml-org/llama.cpp/releases/download"
_DIGESTS = "https://api.github.com/repos/ggml-org/llama.cpp/releases/tags"
"""llama.cpp publishes no checksum file; GitHub's API has the SHA-256 of each file."""

_NAMES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("linux", "amd64", "cpu"): ("llama-{tag}-bin-ubuntu-x64.tar.gz",),
    ("linux", "arm64", "cpu"): ("llama-{tag}-bin-ubuntu-arm64.tar.gz",),
    ("linux", "amd64", "vulkan"): ("llama-{tag}-bin-ubuntu-vulkan-x64.tar.gz",),
    ("linux", "arm64", "vulkan"): ("llama-{tag}-bin-ubuntu-vulkan-arm64.tar.gz",),
    ("linux", "amd64", "rocm"): ("llama-{tag}-bin-ubuntu-rocm-7.2-x64.tar.gz",),
    ("darwin", "arm64", "metal"): ("llama-{tag}-bin-macos-arm64.tar.gz",),
    ("darwin", "amd64", "cpu"): ("llama-{tag}-bin-macos-x64.tar.gz",),
    ("windows", "amd64", "cpu"): ("llama-{tag}-bin-win-cpu-x64.zip",),
    ("windows", "arm64", "cpu"): ("llama-{tag}-bin-win-cpu-arm64.zip",),
    ("windows", "amd64", "vulkan"): ("llama-{tag}-bin-win-vulkan-x64.zip",),
    ("windows", "amd64", "rocm"): ("llama-{tag}-bin-win-hip-radeon-x64.zip",),
    # The second contains NVIDIA's libraries for the first.
    ("windows", "amd64", "cuda"): (
        "llama-{tag}-bin-win-cuda-12.4-x64.zip",
        "cudart-llama-bin-win-cuda-12.4-x64.zip",
    ),
}


def release_archives(tag: str, mirror: str, checksums: str) -> tuple[Archive, ...]:
    """The archives of release `tag`, such as b11549.

    A `mirror` has the layout <mirror>/<tag>/<file>. The digests come from `checksums`, else from the mirror's
    <tag>/SHA256SUMS, else from GitHub.
    """
    base = mirror.rstrip("/") or _DOWNLOADS
    digests = checksums or (f"{base}/{tag}/SHA256SUMS" if mirror else f"{_DIGESTS}/{tag}")
    return tuple(
        Archive(f"{base}/{tag}/{name.format(tag=tag)}", system, machine, accelerator, checksums=digests)
        for (system, machine, accelerator), names in _NAMES.items()
        for name in names
    )
