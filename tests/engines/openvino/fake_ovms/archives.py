"""Releases of the stand-in, laid out as the real archives are, on a server of the tests."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.engines.openvino.releases import Machine, release_archive
from tests.install.packing import Member, pack

if TYPE_CHECKING:
    from tests.models.server import FileServer

__all__ = ["BROKEN", "WHOLE", "Mirror", "install", "program"]

ROOT = Path(__file__).parents[4]

WHOLE = """\
import sys
sys.path[:0] = {root!r},
from tests.engines.openvino.fake_ovms.program import main
sys.exit(main(sys.argv[1:], {version!r}))
"""

BROKEN = """\
import sys
what = "cannot open shared object file: No such file or directory"
sys.exit(127 if sys.stderr.write(sys.argv[0] + ": error while loading shared libraries: {library}: " + what) else 0)
"""


def program(version: str, text: str = WHOLE, library: str = "libxml2.so.2") -> bytes:
    """The stand-in as a file that can be run."""
    return f"#!{sys.executable}\n{text.format(root=str(ROOT), version=version, library=library)}".encode()


def install(folder: Path, version: str = "2026.3.0") -> Path:
    """Unpack it outside the data directory; return the path of its `ovms`."""
    executable = folder / "ovms" / "bin" / "ovms"
    executable.parent.mkdir(parents=True)
    executable.write_bytes(program(version))
    executable.chmod(0o755)
    (folder / "ovms" / "lib" / "python").mkdir(parents=True)
    return executable


class Mirror:
    """A copy of the project's releases, for this machine only."""

    def __init__(self, server: FileServer, root: Path) -> None:
        self.server = server
        self.url = server.url("/mirror")
        self._root = root
        machine = Machine.this({})
        self._flavour = machine.flavour()
        self._python = machine.has_python_for(self._flavour)

    def name(self, version: str) -> str:
        archive = release_archive(version, self._flavour, self.url, "", with_python=self._python)
        assert archive.url.startswith(f"{self.url}/v{version}/")
        return archive.url.rpartition("/")[2]

    def publish(
        self, version: str, text: str = WHOLE, library: str = "libxml2.so.2", *, with_python: bool = True
    ) -> bytes:
        """Have the server serve release `version`, such as 2026.3, from now on."""
        members = [
            Member("ovms/"),
            Member("ovms/LICENSE", b"Apache"),
            Member("ovms/bin/ovms", program(f"{version}.0", text, library), mode=0o755),
            Member("ovms/lib/libopenvino.so", link="libopenvino.so.2630"),
            Member("ovms/lib/libopenvino.so.2630", b"library" * 10_000, mode=0o755),
            Member("ovms/share/espeak-ng-data/voices/!v/Mr serious", b""),
        ]
        members += [Member("ovms/lib/python/pyovms.so", b"")] if with_python else []
        data = pack(self._root / self.name(version), members).read_bytes()
        line = f"{hashlib.sha256(data).hexdigest()}  {self.name(version)}\n"
        self.server.files[f"/mirror/v{version}/SHA256SUMS"] = f"{'0' * 64}  another.zip\n{line}".encode()
        self.server.data = data
        return data

    def fetched(self) -> list[str]:
        """The archives that were asked for."""
        paths = [request.path for request in self.server.requests]
        return [path.rpartition("/")[2] for path in paths if not path.endswith("SHA256SUMS")]
