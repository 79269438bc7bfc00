"""ModelScope: what is in a repository, asked by HTTP: one call that no library is needed for."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from engine_plugin import catalogue
from engine_plugin.download.remote import DroppedError, http_client, open_url
from engine_plugin.download.source import HttpSource
from engine_plugin.errors import AuthError, DownloadError, NotFoundError
from engine_plugin.files import in_thread
from engine_plugin.models.repository import Hub, Listing, RemoteFile, patiently

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.repository import RepositorySource

__all__ = ["ModelScope"]

_LONGEST_ANSWER = 32 * 1024 * 1024
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

    async def listing(
        self, source: RepositorySource, publish: Callable[[PullEvent], None], *, insecure: bool
    ) -> Listing:
        """One call of the hub's API. It names no commit: the files' paths and digests together stand for one."""
        url = (
            f"{self.endpoint}/api/v1/models/{source.repository}/repo/files"
            f"?Revision={quote(source.revision, safe='')}&Recursive=True"
        )
        client = await in_thread(http_client, self.policy, insecure=insecure)
        async with client:
            where = HttpSource(url, token=source.token)
            answer = await patiently(
                lambda: _ask(client, where, insecure=insecure), self.policy, publish, source.label
            )
        return _listing(answer, source)

    def file_url(self, source: RepositorySource, _commit: str, path: str, /) -> str:
        """By the revision as it was asked for; the digests hold the state that was listed."""
        return f"{self.endpoint}/models/{source.repository}/resolve/{quote(source.revision, safe='')}/{path}"

    def _page(self, segments: list[str]) -> tuple[str, str]:
        return super()._page(segments[1:] if segments[:1] == ["models"] else segments)


async def _ask(client: httpx.AsyncClient, source: HttpSource, *, insecure: bool) -> Any:
    import httpx

    try:
        async with open_url(client, source, {"Accept": "application/json"}, insecure=insecure) as answer:
            answer.check_status()
            body = bytearray()
            async for chunk in answer.response.aiter_raw():
                body += chunk
                if len(body) > _LONGEST_ANSWER:
                    raise DownloadError(f"{source.label}: the hub's list of files does not end.")
    except (httpx.ConnectError, httpx.ProxyError) as error:
        raise catalogue.HUB_DOWN.error(
            source=source.label,
            reason=error or type(error).__name__,
            settings="the network, MODELSCOPE_ENDPOINT, HTTPS_PROXY",
        ) from error
    except httpx.TransportError as error:
        raise DroppedError(f"the hub's answer was lost ({error or type(error).__name__})") from error
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise DownloadError(
            f"{source.label}: the hub's answer is no JSON. Is MODELSCOPE_ENDPOINT ModelScope?"
        ) from None


def _listing(answer: Any, source: RepositorySource) -> Listing:
    code = answer.get("Code") if isinstance(answer, dict) else None
    if code == 404:
        raise NotFoundError(f"{source.label}: there is no such repository or revision at ModelScope.")
    if code in {401, 403}:
        raise AuthError(f"{source.label}: the hub refused access ({code}).")
    try:
        if code != 200:
            raise ValueError(f"code {code}")
        files = tuple(
            RemoteFile(str(entry["Path"]), entry["Size"], str(entry.get("Sha256") or "").lower())
            for entry in answer["Data"]["Files"]
            if entry["Type"] != "tree" and entry["Path"] not in _HOUSEKEEPING
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{source.label}: the hub gave no list of files ({error}).") from error
    lines = sorted(f"{file.sha256} {file.size} {file.path}\n" for file in files)
    return Listing(hashlib.sha256("".join(lines).encode()).hexdigest()[:40], files)
