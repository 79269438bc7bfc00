"""Hugging Face: what is in a repository, asked through huggingface_hub.

The library is imported when the first pull needs it, and runs in a thread of its own that nobody waits for when a
pull is cancelled. Of its own accord it would report usage and take a token that it finds in the home directory.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from engine_plugin import catalogue
from engine_plugin.download.remote import DroppedError
from engine_plugin.errors import AuthError, DownloadError, InvalidRequestError, NotFoundError
from engine_plugin.models.repository import Hub, Listing, RemoteFile, patiently

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine_plugin.download.events import PullEvent
    from engine_plugin.models.repository import RepositorySource

__all__ = ["HuggingFace"]

T = TypeVar("T")

_session = threading.Lock()
"""huggingface_hub has one HTTP client for all; one call at a time decides whether it checks certificates."""


class HuggingFace(Hub):
    """huggingface.co, or the mirror that HF_ENDPOINT names."""

    key = "hf"
    title = "Hugging Face"
    default_revision = "main"
    endpoint_variable = "HF_ENDPOINT"
    token_variable = "HF_TOKEN"  # noqa: S105  # a variable's name
    default_endpoint = "https://huggingface.co"
    pages = ("huggingface.co", "www.huggingface.co", "hf.co")

    async def listing(
        self, source: RepositorySource, publish: Callable[[PullEvent], None], *, insecure: bool
    ) -> Listing:
        """One call of the hub's API; the commit is the one that the revision means now."""
        bound = self.policy.connect_s + 2 * self.policy.stall_s

        async def ask() -> Listing:
            try:
                async with asyncio.timeout(bound):
                    return await _in_background(lambda: self._ask(source, insecure=insecure))
            except TimeoutError:
                raise DroppedError(f"{self.endpoint} gave no answer within {bound:.0f} s") from None

        return await patiently(ask, self.policy, publish, source.label)

    def file_url(self, source: RepositorySource, commit: str, path: str, /) -> str:
        """By the commit: what a branch holds may change while it is pulled."""
        return f"{self.endpoint}/{source.repository}/resolve/{quote(commit, safe='')}/{path}"

    def _ask(self, source: RepositorySource, *, insecure: bool) -> Listing:
        """Blocks."""
        from huggingface_hub import HfApi, close_session
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        with _session:
            http = _prepare(self.policy.stall_s, insecure=insecure)
            try:
                api = HfApi(endpoint=self.endpoint, token=source.token or False, library_name="engine-plugin")
                found = api.model_info(
                    source.repository, revision=source.revision, files_metadata=True, timeout=self.policy.stall_s
                )
                return _listing(found)
            except OfflineModeIsEnabled:
                raise DownloadError(
                    f"{source.label}: HF_HUB_OFFLINE is set; unset it to pull from the hub."
                ) from None
            except HFValidationError as error:
                raise InvalidRequestError(f"source: {error}") from None
            except HfHubHTTPError as error:
                raise _refusal(error, source) from error
            except (http.ConnectError, http.ProxyError) as error:
                raise catalogue.HUB_DOWN.error(
                    source=source.label,
                    reason=f"to {self.endpoint}: {error}",
                    settings="the network, HF_ENDPOINT, HTTPS_PROXY",
                ) from error
            except http.TransportError as error:
                raise DroppedError(f"the hub's answer was lost ({error or type(error).__name__})") from error
            except (AttributeError, KeyError, TypeError, ValueError, http.HTTPError) as error:
                raise DownloadError(
                    f"{source.label}: {self.endpoint} gave no list of files ({type(error).__name__}). Is HF_ENDPOINT "
                    "a Hugging Face hub?"
                ) from error
            finally:
                close_session()


def _prepare(patience: float, *, insecure: bool) -> Any:
    """Have the library's one client check certificates or not; returns the HTTP library that it uses."""
    from huggingface_hub import constants, get_session, set_client_factory

    constants.HF_HUB_DISABLE_TELEMETRY = True
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    logger = logging.getLogger("huggingface_hub")
    logger.handlers.clear()  # it prints to stderr itself; what it has to say goes where all our log goes
    logger.propagate = True
    http = sys.modules[type(get_session()).__module__.partition(".")[0]]
    set_client_factory(lambda: http.Client(verify=not insecure, follow_redirects=True, timeout=patience))
    return http


def _listing(found: Any) -> Listing:
    """Raises AttributeError, TypeError or ValueError for an answer that is none."""
    files = []
    for entry in found.siblings:
        size = entry.lfs.size if entry.lfs else entry.size
        sha256 = entry.lfs.sha256 if entry.lfs else ""
        files.append(RemoteFile(str(entry.rfilename), size, sha256, "" if sha256 else entry.blob_id or ""))
    if not isinstance(found.sha, str) or not found.sha:
        raise ValueError("no commit")
    return Listing(found.sha, tuple(files))


def _refusal(error: Any, source: RepositorySource) -> Exception:
    """What the hub's refusal means; its own text is made for programmers."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    place = f"{source.label}: "
    if isinstance(error, GatedRepoError):
        return AuthError(f"{place}access to this repository must be asked for on its page at Hugging Face.")
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(f"{place}the repository has no revision {source.revision!r}.")
    if isinstance(error, RepositoryNotFoundError) and (status != 401 or not source.token):
        return NotFoundError(
            f"{place}there is no such repository at Hugging Face, or it is not public: then give an access token as "
            "password, or as HF_TOKEN."
        )
    if status in {401, 403}:
        return AuthError(f"{place}the hub refused access (HTTP {status}).")
    if status == 404:
        return NotFoundError(f"{place}there is no such repository (HTTP 404).")
    if status in {408, 429} or status >= 500:
        retry_after = error.response.headers.get("retry-after", "")
        return DroppedError(f"HTTP {status}", float(retry_after) if retry_after.isdecimal() else None)
    return DownloadError(f"{place}HTTP {status} is no answer to a question for files.")


async def _in_background(work: Callable[[], T]) -> T:
    """Run `work` in a thread that ends with the process, at the latest; a cancelled caller does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # no error: then there is a result

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001  # it is raised where it is waited for
            error = caught
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="huggingface_hub", daemon=True).start()
    return await future
