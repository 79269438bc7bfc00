"""A hub on loopback that speaks as Hugging Face and as ModelScope do, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.models.server import FileServer, Request, Script

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

__all__ = ["COMMIT", "MODEL", "REPOSITORY", "HubServer", "hub_server"]

REPOSITORY = "Owner/Model-1"
COMMIT = "c0ffee" + "0" * 34

MODEL: dict[str, bytes] = {
    "config.json": b'{"model_type": "toy"}',
    "empty.txt": b"",
    "program.py": b"raise SystemExit",
    "unet/weights.bin": bytes(range(256)) * 800,
    "weights.bin": b"0123456789abcdef" * 20_000,
}


class HubServer(FileServer):
    """One repository. Big files (.bin) are stored as Hugging Face stores LFS files: behind a redirect."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.tree = dict(MODEL)
        self.commit = COMMIT
        self.listed: list[dict[str, Any]] | None = None
        """What the list says in the place of the truth."""
        self.storage = ""
        """Where LFS files are, if not here."""
        self.token = ""
        self.refusal: Script | None = None
        """How everything is answered that comes without the token."""
        self.troubles: defaultdict[str, deque[Script]] = defaultdict(deque)
        """Scripts by a file's name; "list" is the list of files."""
        self.fetched: list[tuple[str, str]] = []
        """Each file that was asked for, by its name, and the range of it."""
        self.asked = asyncio.Event()

    def content(self, request: Request) -> tuple[bytes, str]:
        path = self._path(request)
        if path.startswith("/storage/"):
            digest = path.removeprefix("/storage/")
            return next(data for data in self.tree.values() if _sha256(data) == digest), f'"{digest}"'
        data = self.tree[path.partition("/resolve/")[2].partition("/")[2]]
        return data, f'"{_blob(data)}"'

    async def answer(self, writer: asyncio.StreamWriter, request: Request) -> None:
        self.asked.set()
        path = self._path(request)
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}" and self.refusal:
            await self.send(writer, Script(**vars(self.refusal)))
            return
        trouble = self._trouble(path)
        if trouble is not None and trouble.status:
            await self.send(writer, trouble)
        elif path in {f"/api/models/{REPOSITORY}/revision/main", f"/api/models/{REPOSITORY}/revision/v1"}:
            await self._json(writer, self._huggingface())
        elif path == f"/api/v1/models/{REPOSITORY}/repo/files":
            await self._json(writer, self._modelscope())
        elif path.startswith("/api/"):
            await self.send(writer, Script(status=404, body=b"{}", headers={"X-Error-Code": "RepoNotFound"}))
        else:
            await self._resolve(writer, request, trouble or Script())

    async def _resolve(self, writer: asyncio.StreamWriter, request: Request, script: Script) -> None:
        path = self._path(request)
        name = path.partition("/resolve/")[2].partition("/")[2]
        if name and name not in self.tree:
            await self.send(writer, Script(status=404, body=b"Entry not found"))
        elif name.endswith(".bin") and not path.startswith("/models/"):
            digest = _sha256(self.tree[name])
            headers = {"Location": f"{self.storage}/storage/{digest}", "X-Linked-Etag": f'"{digest}"'}
            headers["X-Linked-Size"] = str(len(self.tree[name]))
            await self.send(writer, Script(status=302, body=b"", headers=headers))
        else:
            digest = path.removeprefix("/storage/")
            name = name or next(name for name, data in self.tree.items() if _sha256(data) == digest)
            self.fetched.append((name, request.range))
            await self.file(writer, request, script)

    def _path(self, request: Request) -> str:
        return unquote(urlsplit(request.path).path)

    def _trouble(self, path: str) -> Script | None:
        end = "list" if path.startswith("/api/") else path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith("/storage/"):
            digest = path.removeprefix("/storage/")
            end = next(name for name, data in self.tree.items() if _sha256(data) == digest)
        elif end.endswith(".bin") and not path.startswith("/models/"):
            return None  # the redirect goes well, what is behind it does not
        return self.troubles[end].popleft() if self.troubles[end] else None

    async def _json(self, writer: asyncio.StreamWriter, value: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        await self.send(writer, Script(status=200, body=json.dumps(value).encode(), headers=headers))

    def _huggingface(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for path, data in self.tree.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _blob(data)}
            if path.endswith(".bin"):
                entry["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        listed = siblings if self.listed is None else self.listed
        return {"id": REPOSITORY, "sha": self.commit, "private": False, "siblings": listed}

    def _modelscope(self) -> dict[str, Any]:
        files: list[dict[str, Any]] = [{"Path": "unet", "Type": "tree", "Size": 0, "Sha256": ""}]
        files.append({"Path": ".gitattributes", "Type": "blob", "Size": 10, "Sha256": "0" * 64})
        for path, data in self.tree.items():
            files.append({"Path": path, "Type": "blob", "Size": len(data), "Sha256": _sha256(data)})
        listed = files if self.listed is None else self.listed
        return {"Code": 200, "Success": True, "Data": {"Files": listed}}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324  # as git names its blobs


@asynccontextmanager
async def hub_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[HubServer]:
    hub = HubServer()
    hub.scheme = "https" if tls else "http"
    server = await asyncio.start_server(hub.connected, "127.0.0.1", 0, ssl=tls)
    hub.port = server.sockets[0].getsockname()[1]
    try:
        yield hub
    finally:
        await hub.close_connections()
        server.close()
        await server.wait_closed()
