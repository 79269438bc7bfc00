"""Hubs: Hugging Face and ModelScope, the files of their repositories, and the checks of these lists.

https://huggingface.co/docs/hub/api describes the API of Hugging Face; its header X-Error-Code has the reason of a
refusal.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from engine_plugin.download.remote import DroppedError, FetchPolicy, http_client, open_url, patiently
from engine_plugin.download.source import LOOPBACK, HttpSource, without_secrets
from engine_plugin.errors import (
    AuthError,
    DownloadError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    PullError,
)
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.models.names import is_model_name
from engine_plugin.redaction import entered, redacted
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.system.names import is_device_name
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import httpx

    from engine_plugin.download.events import PullEvent

__all__ = [
    "Hub",
    "HuggingFace",
    "Listing",
    "ModelScope",
    "RemoteFile",
    "RepositorySource",
    "checked_files",
    "hubs_of",
    "refuse_offline",
]

_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_HEX40 = re.compile(r"[0-9a-f]{40}")
_SEGMENT = re.compile(r"[A-Za-z0-9_+(\[=-](?:[A-Za-z0-9 _+()\[\]=.,@&~-]{0,198}[A-Za-z0-9_+)\]=-])?")
"""A file name that every system can store, and that is not hidden."""
_MOST_FILES = 10_000
_LARGEST = 2**63
"""Bytes; every file is smaller."""


@dataclass(frozen=True, slots=True)
class RepositorySource:
    """A repository on a hub: its id `owner/name`, a branch, tag or commit, and an access token, which no repr has."""

    hub: str
    repository: str
    revision: str
    token: str = field(default="", repr=False, compare=False)

    @property
    def label(self) -> str:
        """The reference that a pull takes, for messages and records."""
        return f"{self.hub}:{self.repository}@{self.revision}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repository. `path` has `/`, `size` is in bytes; at most one of the digests (hex) is known.

    `blob` is git's: SHA-1 over a small header and the content.
    """

    path: str
    size: int
    sha256: str = ""
    blob: str = ""

    @property
    def has_digest(self) -> bool:
        """Whether the content of a file can be compared with this one's."""
        return bool(self.sha256 or self.blob)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository. `commit` identifies this version of it."""

    commit: str
    files: tuple[RemoteFile, ...]


class Hub(ABC):
    """A site with repositories. `endpoint` is its address; the access token is sent to no other."""

    key: str
    """Its prefix in references: `hf` in `hf:owner/name`."""
    title: str
    default_revision: str
    endpoint_variable: str
    token_variable: str
    default_endpoint: str
    pages: tuple[str, ...]
    """The hosts of its web pages, besides the endpoint's."""
    list_path: str
    """The path of the list of a repository's files, below the endpoint."""
    file_path: str
    """The path of a file, below the endpoint."""
    offline_variables: tuple[str, ...] = ()
    """The environment variables that forbid its use; the first that is not empty counts."""

    def __init__(self, environ: Mapping[str, str], policy: FetchPolicy) -> None:
        """Read endpoint and token from the environment. No I/O."""
        self.endpoint = (environ.get(self.endpoint_variable, "").strip() or self.default_endpoint).rstrip("/")
        if "://" not in self.endpoint:
            self.endpoint = f"https://{self.endpoint}"
        self.policy = policy
        self._environ = environ
        self._token = entered(environ.get(self.token_variable, ""))

    def refuse(self) -> None:
        """Raise PreconditionError if the environment forbids the use of the hub."""
        variable = next((name for name in self.offline_variables if self._environ.get(name)), "")
        value = self._environ.get(variable, "").strip()
        if value.upper() in _TRUE:
            raise PreconditionError(
                f"{variable}={value} is set in the environment of the plugin: nothing is pulled from {self.title}. "
                "Unset it and start the plugin again, or pull from a path."
            )

    async def listing(
        self, source: RepositorySource, publish: Callable[[PullEvent], None], *, insecure: bool
    ) -> Listing:
        """Ask the hub for the files of a repository, in one call of its API.

        Raises DownloadError, AuthError, NotFoundError, InvalidRequestError.
        """
        where = self._place(self.list_path, source)
        client = await in_thread(http_client, self.policy, insecure=insecure)
        async with client:
            answer = await patiently(
                lambda: self._ask(client, where, source, insecure=insecure), self.policy, publish, source.label
            )
        return self.read_listing(answer, source)

    def read_listing(self, answer: Any, source: RepositorySource) -> Listing:
        """Read the list in a hub's answer. Raises DownloadError, and AuthError or NotFoundError for a refusal."""
        try:
            listing = self._listing(answer, source)
            texts = [text for file in listing.files for text in (file.path, file.sha256, file.blob)]
            if not listing.commit or not all(isinstance(text, str) for text in (listing.commit, *texts)):
                raise TypeError("no commit, or an entry whose path or digest is not a string")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DownloadError(self._no_list(source, type(error).__name__)) from error
        return listing

    def _check(self, response: httpx.Response, source: RepositorySource) -> None:  # noqa: B027  # the status says all
        """Raise the error for a refusal, where this hub gives more than the status."""

    @abstractmethod
    def _listing(self, answer: Any, source: RepositorySource, /) -> Listing:
        """Read the list in a hub's JSON. Other JSON raises AttributeError, LookupError, TypeError or ValueError."""

    async def _ask(
        self, client: httpx.AsyncClient, where: HttpSource, source: RepositorySource, *, insecure: bool
    ) -> Any:
        """The JSON of an answer, bounded in bytes and time. Raises DroppedError where another attempt may succeed."""
        bound = self.policy.connect_s + 2 * self.policy.stall_s
        headers, settings = {"Accept": "application/json"}, f"the network, {self.endpoint_variable}, HTTPS_PROXY"
        body = bytearray()
        try:
            async with (
                asyncio.timeout(bound),
                open_url(client, where, headers, insecure=insecure, settings=settings) as answer,
            ):
                if answer.response.status_code != 200:
                    self._check(answer.response, source)
                answer.check_status()
                async for chunk in answer.response.aiter_raw():
                    body += chunk
                    if len(body) > LARGEST_JSON:
                        raise DownloadError(
                            f"{where.label}: the hub's list of files is larger than {byte_size(LARGEST_JSON)}."
                        )
        except TimeoutError:
            raise DroppedError(f"{self.endpoint} gave no answer within {bound:.0f} s") from None
        try:
            return await in_thread(read_json, bytes(body), LARGEST_JSON)
        except JsonError as error:
            raise DownloadError(self._no_list(source, f"its answer {error}")) from None

    def _no_list(self, source: RepositorySource, why: str) -> str:
        return (
            f"{source.label}: {self.endpoint} gave no valid list of files ({why}). Is {self.endpoint_variable} a "
            f"{self.title} hub?"
        )

    @property
    def host(self) -> str:
        """The host in the endpoint; "" if the environment has no valid http(s) URL."""
        try:
            return urlsplit(HttpSource.parse(self.endpoint).url).hostname or ""
        except ValueError:
            return ""

    def source(self, repository: str, revision: str, token: str, where: str, *, insecure: bool) -> RepositorySource:
        """A repository of this hub; `token` "" means that of the environment.

        `where` is the field that names it. Raises InvalidRequestError and PreconditionError.
        """
        if "/" not in repository or not is_model_name(repository, owner=True):
            raise InvalidRequestError.at(
                where, f"{redacted(repository)[:128]!r} is not a repository of {self.title}: write owner/name."
            )
        self.refuse()
        if not self.host:
            raise PreconditionError(
                f"{self.endpoint_variable}: {without_secrets(self.endpoint)!r} is not an http(s) URL. Correct it in "
                "the environment of the plugin, or unset it."
            )
        revision = revision or self.default_revision
        if not _REVISION.fullmatch(revision):
            raise InvalidRequestError.at(where, f"{revision[:64]!r} is not a valid branch, tag or commit.")
        token = entered(token) or self._token
        if not token.isascii() or not token.isprintable():
            raise InvalidRequestError.at("password", f"not a valid access token of {self.title}.")
        parts = urlsplit(self.endpoint)
        if token and parts.scheme == "http" and parts.hostname not in LOOPBACK and not insecure:
            raise InvalidRequestError.at(
                where,
                f"the token would cross the network unprotected; give {self.endpoint_variable} an https "
                "address, or set insecure to allow it.",
            )
        return RepositorySource(self.key, repository, revision, token)

    def page(self, url: str) -> tuple[str, str] | None:
        """The repository and the revision ("" for the default) of a page's URL; None for a page of another site."""
        try:
            parts, own = urlsplit(url), urlsplit(self.endpoint).netloc
        except ValueError:
            return None
        if parts.scheme not in {"http", "https"} or parts.netloc.rpartition("@")[2] not in {*self.pages, own}:
            return None
        segments = [unquote(segment) for segment in parts.path.split("/") if segment]
        if segments[:1] == ["models"]:
            del segments[0]  # on ModelScope's pages
        revision = segments[3] if len(segments) > 3 and segments[2] == "tree" else ""
        return "/".join(segments[:2]), revision

    def file_source(self, source: RepositorySource, commit: str, path: str) -> HttpSource:
        """The source of a file, for a download."""
        return self._place(self.file_path, source, commit=quote(commit, safe=""), path=quote(path))

    def _place(self, form: str, source: RepositorySource, **parts: str) -> HttpSource:
        revision = quote(source.revision, safe="")
        path = form.format(repository=source.repository, revision=revision, **parts)
        return HttpSource(f"{self.endpoint}{path}", token=source.token)


_TRUE = frozenset({"1", "ON", "YES", "TRUE"})
"""The values that mean true to huggingface_hub, in any case."""


def refuse_offline(environ: Mapping[str, str], url: str = "") -> None:
    """Raise PreconditionError if the environment forbids the use of Hugging Face and `url` ("" for any) is there."""
    hub = HuggingFace(environ, FetchPolicy())
    if not url or urlsplit(url).hostname in {*hub.pages, hub.host}:
        hub.refuse()


class HuggingFace(Hub):
    """huggingface.co, or the mirror that HF_ENDPOINT names. Files are requested by commit: a branch may change."""

    key = "hf"
    title = "Hugging Face"
    default_revision = "main"
    endpoint_variable = "HF_ENDPOINT"
    token_variable = "HF_TOKEN"  # noqa: S105  # a variable's name
    default_endpoint = "https://huggingface.co"
    pages = ("huggingface.co", "www.huggingface.co", "hf.co")
    list_path = "/api/models/{repository}/revision/{revision}?blobs=true"
    file_path = "/{repository}/resolve/{commit}/{path}"
    offline_variables = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # as in huggingface_hub

    def _check(self, response: httpx.Response, source: RepositorySource) -> None:
        place, status = f"{source.label}: ", response.status_code
        code = response.headers.get("x-error-code", "")
        if code == "GatedRepo":
            raise AuthError(f"{place}the repository is gated. Request access on its page at Hugging Face.")
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
        """Has the commit to which the revision points now."""
        files = []
        for entry in answer["siblings"]:
            lfs = entry.get("lfs") or {}
            sha256 = lfs.get("sha256") or ""
            size = lfs["size"] if sha256 else entry.get("size")
            files.append(RemoteFile(entry["rfilename"], size, sha256, "" if sha256 else entry.get("blobId") or ""))
        return Listing(answer["sha"], tuple(files))


_HOUSEKEEPING = frozenset({".gitignore", ".gitattributes", ".gitmodules"})


class ModelScope(Hub):
    """modelscope.cn, or the address that MODELSCOPE_ENDPOINT names.

    Files are requested by the revision in the reference; the listed digests identify the version.
    """

    key = "ms"
    title = "ModelScope"
    default_revision = "master"
    endpoint_variable = "MODELSCOPE_ENDPOINT"
    token_variable = "MODELSCOPE_API_TOKEN"  # noqa: S105  # a variable's name
    default_endpoint = "https://modelscope.cn"
    pages = ("modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai")
    list_path = "/api/v1/models/{repository}/repo/files?Revision={revision}&Recursive=True"
    file_path = "/models/{repository}/resolve/{revision}/{path}"

    def _listing(self, answer: Any, source: RepositorySource) -> Listing:
        """Derives a commit from the paths and digests of the files, since the API has none."""
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


def hubs_of(environ: Mapping[str, str], policy: FetchPolicy) -> dict[str, Hub]:
    """The hubs by their prefixes in references."""
    return {hub.key: hub for hub in (HuggingFace(environ, policy), ModelScope(environ, policy))}


def checked_files(files: Iterable[RemoteFile], label: str) -> list[RemoteFile]:
    """Return the files if all can be stored below one folder on every system. Raises PullError.

    The list is a server's: it may have paths out of the folder, or names that are one name to some file systems.
    """
    listed = list(files)
    if len(listed) > _MOST_FILES:
        raise PullError(f"{label}: {len(listed)} files exceed the limit of {_MOST_FILES}.")
    taken: dict[str, str] = {}
    for file in listed:
        _check_entry(file, label)
        ends = [index + 1 for index, letter in enumerate(file.path) if letter == "/"]
        for name in (*(file.path[:end] for end in ends), file.path):  # each folder, with its slash, and the file
            key = name.rstrip("/").casefold()
            if taken.get(key, name) != name or (name == file.path and key in taken):
                raise PullError(
                    f"{label}: {file.path!r} and {taken[key]!r} cannot both be stored: some file systems ignore case."
                )
            taken[key] = name
    return listed


def _check_entry(file: RemoteFile, label: str) -> None:
    if not all(_SEGMENT.fullmatch(segment) and not is_device_name(segment) for segment in file.path.split("/")):
        raise PullError(f"{label}: {file.path[:200]!r} is not a safe file name.")
    if type(file.size) is not int or not 0 <= file.size < _LARGEST:
        raise PullError(f"{label}: the hub gives no valid size for {file.path}.")
    if (file.sha256 and not _HEX64.fullmatch(file.sha256)) or (file.blob and not _HEX40.fullmatch(file.blob)):
        raise PullError(f"{label}: the hub gives no valid digest for {file.path}.")
