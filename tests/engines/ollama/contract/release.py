"""Releases whose ollama is the contract server: their archives, and a mirror of them."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.engines.ollama.releases import release_archives
from engine_plugin.install.releases import select_archives
from tests.install.packing import Member, pack

if TYPE_CHECKING:
    from tests.models.server import FileServer

__all__ = ["Mirror", "members", "program", "write_program"]

_REPOSITORY = Path(__file__).resolve().parents[4]


def program(*options: str) -> bytes:
    """The text of an executable `ollama`: the contract server with these options. POSIX only."""
    lines = (
        f"#!{sys.executable} -P",
        "import sys",
        f"sys.path.insert(0, {str(_REPOSITORY)!r})",
        "from tests.engines.ollama.contract.program import main",
        f"sys.exit(main([*{list(options)!r}, *sys.argv[1:]]))",
        "",
    )
    return "\n".join(lines).encode()


def write_program(folder: Path, *options: str) -> Path:
    """Write the executable to a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ollama"
    path.write_bytes(program(*options))
    path.chmod(0o755)
    return path


def members(*options: str) -> list[Member]:
    """The members of a release archive for Linux."""
    return [
        Member("bin/"),
        Member("bin/ollama", program(*options), mode=0o755),
        Member("lib/"),
        Member("lib/ollama/"),
        Member("lib/ollama/libggml-base.so", link="libggml-base.so.0"),
        Member("lib/ollama/libggml-base.so.0", b"library" * 1000),
        Member("lib/ollama/cuda_v13/libggml-cuda.so", b"kernels" * 1000),
    ]


class Mirror:
    """A mirror of Ollama's releases on loopback, with archives for this machine only."""

    def __init__(self, server: FileServer, scratch: Path) -> None:
        """Archives are written to `scratch`."""
        self._server = server
        self._scratch = scratch
        self.url = server.url("/mirror")

    def name(self, version: str) -> str:
        """The name of the archive for this machine."""
        return select_archives(release_archives(version, self.url, ""), "cpu")[0].url.rpartition("/")[2]

    def publish(self, version: str, *options: str, digest: str = "") -> bytes:
        """Publish a release whose server has these options;

        returns its bytes. `digest` replaces the published one.
        """
        name = self.name(version)
        data = pack(self._scratch / name, members("--be-version", version, "--bare", *options)).read_bytes()
        self.publish_file(version, name, data)
        listed = digest or hashlib.sha256(data).hexdigest()
        sums = f"{'0' * 64}  ./ollama-windows-amd64.zip\n{listed}  ./{name}\n"
        self.publish_file(version, "sha256sum.txt", sums.encode())
        return data

    def publish_file(self, version: str, name: str, data: bytes) -> None:
        """Publish one file of a release."""
        self._server.files[f"/mirror/v{version}/{name}"] = data

    def fetched(self) -> list[str]:
        """The requested archives in order, as <tag>/<file>."""
        paths = [request.path.removeprefix("/mirror/") for request in self._server.requests]
        return [path for path in paths if not path.endswith(".txt")]
