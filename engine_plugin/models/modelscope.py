"""ModelScope: what is in a repository, asked by one call of its API."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from engine_plugin.errors import AuthError, NotFoundError
from engine_plugin.models.repository import Hub, Listing, RemoteFile

if TYPE_CHECKING:
    from engine_plugin.models.repository import RepositorySource

__all__ = ["ModelScope"]

_HOUSEKEEPING = frozenset({".gitignore", ".gitattributes", ".gitmodules"})


class ModelScope(Hub):
    """modelscope.cn, or the address that MODELSCOPE_ENDPOINT names."""

    key = "ms"
    title = "ModelScope"
    default_revision = "master"
    endpoint_variable = "MODELSCOPE_ENDPOINT"
    token_variable = "MODELSCOPE_API_TOKEN"  # noqa: S105  # a variable's name
    default_endpoint = "https://modelscope.cn"
    pages = ("modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai")

    def file_url(self, source: RepositorySource, _commit: str, path: str, /) -> str:
        """By the revision as it was asked for; the digests hold the state that was listed."""
        return f"{self.endpoint}/models/{source.repository}/resolve/{quote(source.revision, safe='')}/{path}"

    def _page(self, segments: list[str]) -> tuple[str, str]:
        return super()._page(segments[1:] if segments[:1] == ["models"] else segments)

    def _list_url(self, source: RepositorySource) -> str:
        return (
            f"{self.endpoint}/api/v1/models/{source.repository}/repo/files"
            f"?Revision={quote(source.revision, safe='')}&Recursive=True"
        )

    def _listing(self, answer: Any, source: RepositorySource) -> Listing:
        """The API names no commit: the files' paths and digests together stand for one."""
        code = answer["Code"]
        if code == 404:
            raise NotFoundError(f"{source.label}: there is no such repository or revision at ModelScope.")
        if code in {401, 403}:
            raise AuthError(f"{source.label}: the hub refused access ({code}).")
        if code != 200:
            raise ValueError(f"code {code!r}"[:64])
        files = tuple(
            RemoteFile(entry["Path"], entry["Size"], (entry.get("Sha256") or "").lower())
            for entry in answer["Data"]["Files"]
            if entry["Type"] != "tree" and entry["Path"] not in _HOUSEKEEPING
        )
        lines = sorted(f"{file.sha256} {file.size} {file.path}\n" for file in files)
        return Listing(hashlib.sha256("".join(lines).encode("utf-8", "replace")).hexdigest()[:40], files)
