"""Hugging Face: what is in a repository, asked by one call of its API.

https://huggingface.co/docs/hub/api has the call; the header X-Error-Code says why one is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from engine_plugin.download.remote import FetchPolicy
from engine_plugin.errors import AuthError, NotFoundError, PreconditionError
from engine_plugin.models.repository import Hub, Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx

    from engine_plugin.models.repository import RepositorySource

__all__ = ["HuggingFace", "refuse_offline"]

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
"""What huggingface_hub takes for true, in any case."""
_PAGES = ("huggingface.co", "www.huggingface.co", "hf.co")


def refuse_offline(environ: Mapping[str, str], url: str = "") -> None:
    """Raise PreconditionError where the environment keeps programs from Hugging Face, and `url` ("" any) is there.

    The first of HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE that is not empty counts, as in huggingface_hub.
    """
    variable = next((name for name in _OFFLINE if environ.get(name)), "")
    if not variable or environ[variable].strip().upper() not in _TRUE:
        return
    mirror = HuggingFace(environ, FetchPolicy()).host
    if url and urlsplit(url).hostname not in {*_PAGES, mirror}:
        return
    raise PreconditionError(
        f"{variable}={environ[variable].strip()} is set in the environment of the plugin: nothing is pulled from "
        "Hugging Face. Unset it and start the plugin again, or pull from a path."
    )


class HuggingFace(Hub):
    """huggingface.co, or the mirror that HF_ENDPOINT names."""

    key = "hf"
    title = "Hugging Face"
    default_revision = "main"
    endpoint_variable = "HF_ENDPOINT"
    token_variable = "HF_TOKEN"  # noqa: S105  # a variable's name
    default_endpoint = "https://huggingface.co"
    pages = _PAGES

    def refuse(self) -> None:
        """As `refuse_offline`."""
        refuse_offline(self._environ)

    def file_url(self, source: RepositorySource, commit: str, path: str, /) -> str:
        """By the commit: what a branch holds may change while it is pulled."""
        return f"{self.endpoint}/{source.repository}/resolve/{quote(commit, safe='')}/{path}"

    def _list_url(self, source: RepositorySource) -> str:
        return f"{self.endpoint}/api/models/{source.repository}/revision/{quote(source.revision, safe='')}?blobs=true"

    def _check(self, response: httpx.Response, source: RepositorySource) -> None:
        place, status = f"{source.label}: ", response.status_code
        code = response.headers.get("x-error-code", "")
        if code == "GatedRepo":
            raise AuthError(f"{place}access to this repository must be asked for on its page at Hugging Face.")
        if code == "RevisionNotFound":
            raise NotFoundError(f"{place}the repository has no revision {source.revision!r}.")
        unknown = code == "RepoNotFound" or status == 401
        if unknown and (status != 401 or not source.token):
            raise NotFoundError(
                f"{place}there is no such repository at Hugging Face, or it is not public: then give an access token "
                "as password, or as HF_TOKEN."
            )
        if status in {401, 403}:
            raise AuthError(f"{place}the hub refused access (HTTP {status}).")
        if status == 404:
            raise NotFoundError(f"{place}there is no such repository (HTTP 404).")

    def _listing(self, answer: Any, _source: RepositorySource) -> Listing:
        """The commit is the one that the revision means now."""
        files = []
        for entry in answer["siblings"]:
            lfs = entry.get("lfs") or {}
            sha256 = lfs.get("sha256") or ""
            size = lfs["size"] if sha256 else entry.get("size")
            files.append(RemoteFile(entry["rfilename"], size, sha256, "" if sha256 else entry.get("blobId") or ""))
        return Listing(answer["sha"], tuple(files))
