"""A request to pull a model, and its plan: a name, a source, the expected digest and the kind."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.download.source import HttpSource, file_path, without_secrets
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError
from engine_plugin.models.gguf import GgufError, part_names, whole_name
from engine_plugin.models.info import kind_of_type
from engine_plugin.models.names import is_model_name, near_names, validate_model_name
from engine_plugin.models.pull_request import PullRequest
from engine_plugin.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import TypeAlias

    from engine_plugin.models.hubs import Hub, RepositorySource
    from engine_plugin.models.index import Record
    from engine_plugin.models.info import Samples, StoredModel

    Source: TypeAlias = "LocalSource | HttpSource | PartsSource | RepositorySource"

__all__ = [
    "COPY",
    "FileSources",
    "FolderSources",
    "LocalSource",
    "PartsSource",
    "PullPlan",
    "PullRequest",
    "Sources",
    "StoredSource",
    "agreed",
    "local_path",
    "plan_pull",
    "read_request",
]

COPY = "model:"
"""The prefix of a source that is a present model: `model:OLD` copies it."""

_HUB_REFERENCE = re.compile(r"(hf|ms):(?!//)([^@]*)(?:@(.*))?")
"""`hf:owner/name@revision`: the hub, the repository and the revision, if any."""

_PATHS = ("./", "../", "~/", ".\\", "..\\")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5
"""The most missing parts that a message names."""


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A file or folder on this machine; `sample` if it is one of the package."""

    path: Path
    sample: StoredModel | None = None

    @property
    def label(self) -> str:
        """The source, for messages and records."""
        return f"sample:{self.sample.name}" if self.sample else str(self.path)


@dataclass(frozen=True, slots=True)
class StoredSource(LocalSource):
    """A present model, with its record. A copy is a hard link where the file system supports it."""

    record: Record = field(kw_only=True, compare=False)

    @property
    def label(self) -> str:
        """The source as a pull takes it, for messages and records."""
        return f"{COPY}{self.record.name}"


@dataclass(frozen=True, slots=True)
class PartsSource:
    """The parts of a GGUF model, in their order."""

    parts: tuple[LocalSource, ...] | tuple[HttpSource, ...]

    @property
    def label(self) -> str:
        """The label of the first part."""
        return self.parts[0].label


@dataclass(frozen=True, slots=True)
class PullPlan:
    """The plan of a pull. Concurrent pulls with equal plans share one task; credentials are not compared."""

    name: str
    source: Source
    sha256: str
    """64 hex digits, or "" if unknown."""
    kind: str
    """One of KINDS, or "" for that which the inspection finds."""
    insecure: bool


def read_request(request: PullRequest) -> tuple[str, str, str]:
    """The source of a request, the field that has it, and the expected digest: 64 hex digits or "".

    Raises InvalidRequestError.
    """
    if not request.model:
        raise InvalidRequestError.at("model", "must be a string that is not empty.")
    where = "source" if request.source else "model"
    return request.source or request.model, where, _sha256(request.sha256, "sha256")


def agreed(digest: str, inline: str) -> str:
    """The digest of the request or its source. Raises InvalidRequestError if both give one and they differ."""
    if digest and inline and digest != inline:
        raise InvalidRequestError.at("sha256", "differs from the digest in the source.")
    return digest or inline


def local_path(text: str, where: str) -> Path:
    """The path in a path or a file:// URL. Raises InvalidRequestError about the field `where`."""
    if "://" not in text:
        return Path(text)
    try:
        return file_path(text)
    except ValueError as error:
        raise InvalidRequestError.at(where, f"{error}.") from None


def _sha256(value: str, where: str) -> str:
    digest = value.strip().lower().removeprefix("sha256:")
    if digest and not _HEX64.fullmatch(digest):
        raise InvalidRequestError.at(where, "must be a SHA-256 digest of 64 hexadecimal digits.")
    return digest


class Sources(ABC):
    """The sources from which a store pulls, besides samples and its own models."""

    takes: str
    """All of them, for messages."""

    brief: str
    """The usual ones, for messages."""

    folders: bool
    """Whether the models are folders."""

    @abstractmethod
    def is_path(self, text: str) -> bool:
        """Whether a reference is a local path or a file:// URL."""

    @abstractmethod
    def find(self, text: str, request: PullRequest, where: str) -> tuple[Source, str, str] | None:
        """The source that a reference in the field `where` means, the model's name there, and its digest, if known.

        None for a reference of another form. Stats local files. Raises InvalidRequestError, ModelNotFoundError and
        PreconditionError.
        """

    def pullable(self, name: str) -> str:  # noqa: ARG002  # for stores whose names are references
        """The reference with which a model of that name can be pulled, "" if the name is not enough."""
        return ""

    def _existing(self, path: Path, where: str) -> Path:
        """The absolute path of a file or folder. Raises ModelNotFoundError, and InvalidRequestError for the other."""
        kind = "folder" if self.folders else "file"
        try:
            path = path.expanduser().resolve() if self.folders else path.expanduser().absolute()
            if path.is_dir() if self.folders else path.is_file():
                return path
            found = path.exists()
        except (OSError, RuntimeError, ValueError):
            found = False
        if not found:
            raise ModelNotFoundError(f"{where}: there is no {kind} {str(path)!r}.")
        is_what = "is a file; a model is the folder with all its files" if self.folders else "is not a file"
        raise InvalidRequestError.at(where, f"{str(path)!r} {is_what}.")


class FileSources(Sources):
    """Files that end in `suffix`, on this machine or on a server; or all parts of one."""

    folders = False

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self.takes = self.brief = f"a path or file:// URL ending in {suffix}, or an http(s) URL"

    def is_path(self, text: str) -> bool:
        """As the suffix says."""
        return text.lower().startswith("file://") or ("://" not in text and text.lower().endswith(self._suffix))

    def find(self, text: str, request: PullRequest, where: str) -> tuple[Source, str, str] | None:
        """A file, or the parts of one."""
        source: LocalSource | HttpSource
        scheme, digest = text.partition("://")[0].lower() if "://" in text else "", ""
        if scheme in {"http", "https"}:
            source, file, digest = _http(text, request, where)
        elif self.is_path(text):
            path = local_path(text, where)
            if not path.name.lower().endswith(self._suffix):
                raise InvalidRequestError.at(
                    where, f"{str(path)!r} does not end in {self._suffix}: only model files can be pulled."
                )
            source = LocalSource(self._existing(path, where))
            file = source.path.name
        elif scheme:
            raise InvalidRequestError.at(where, f"{scheme[:32]}:// is not supported. A pull takes {self.takes}.")
        else:
            return None
        parts = _parts(source, file, where)
        if parts is not None:
            file = whole_name(file)
        stem = file[: -len(self._suffix)] if file.lower().endswith(self._suffix) else file
        return parts or source, stem, digest


class FolderSources(Sources):
    """Folders on this machine, and repositories on hubs."""

    folders = True
    takes = (
        "owner/name on the default hub, hf:owner/name or ms:owner/name (with @revision), the URL of a model's page "
        "on Hugging Face or ModelScope, or the path or file:// URL of a folder (./name for a relative one)"
    )
    brief = "owner/name on a hub, the URL of its page there, or the path of a folder"

    def __init__(self, hubs: Mapping[str, Hub], default_hub: str) -> None:
        """`hubs` are those of `hubs_of`; `default_hub` is the prefix of the one that a reference without prefix
        means."""
        self._hubs = hubs
        self._default_hub = default_hub

    def is_path(self, text: str) -> bool:
        """A relative path begins with a dot: `a/b` is a repository."""
        if "://" in text:
            return text.lower().startswith("file://")
        return text in {".", "..", "~"} or text.startswith(_PATHS) or Path(text).is_absolute()

    def find(self, text: str, request: PullRequest, where: str) -> tuple[Source, str, str] | None:
        """A folder or a repository."""
        if self.is_path(text):
            path = self._existing(local_path(text, where), where)
            return LocalSource(path), path.name, ""
        named = _HUB_REFERENCE.fullmatch(text)
        if named:
            hub, repository, revision = self._hubs[named[1]], named[2], named[3] or ""
        elif "://" in text:
            hub, repository, revision = self._page(text, where)
        elif text.count("/") == 1:
            repository, _, revision = text.partition("@")
            hub = self._hubs[self._default_hub]
        else:
            return None
        source = hub.source(repository, revision, request.password, where, insecure=request.insecure)
        return source, repository, ""

    def pullable(self, name: str) -> str:
        """A reference of a repository."""
        named = _HUB_REFERENCE.fullmatch(name)
        repository = named[2] if named else name.partition("@")[0]
        return name if "/" in repository and is_model_name(repository, owner=True) else ""

    def _page(self, url: str, where: str) -> tuple[Hub, str, str]:
        """The hub, repository and revision that the URL of a web page shows. Raises InvalidRequestError."""
        scheme, _, rest = url.partition("://")
        if scheme.lower() in self._hubs:
            right = f"{scheme.lower()}:{rest.strip('/') or 'owner/name'}"
            raise InvalidRequestError.at(
                where, f"{redacted(url)[:128]!r} is not a valid reference. Write {right[:128]!r}."
            )
        for hub in self._hubs.values():
            if page := hub.page(url):
                return hub, *page
        known = " or ".join(hub.title for hub in self._hubs.values())
        raise InvalidRequestError.at(
            where,
            f"{without_secrets(url)!r} is not a model's page on {known}; a model of this engine is a folder of "
            "files, not one file.",
        )


def plan_pull(request: PullRequest, sources: Sources, samples: Samples, present: Sequence[str]) -> PullPlan:
    """The plan for a request. Stats local files: call it in a thread.

    `present` are the names of the models in the store, for the message of ModelNotFoundError. Raises
    InvalidRequestError and PreconditionError too.
    """
    kind = kind_of_type(request.model_type)
    text, where, digest = read_request(request)
    sample = samples.get(text)
    found: tuple[Source, str, str] | None
    if sample is not None:
        kind = kind or sample.kind
        found = LocalSource(sample.path, sample), sample.name, sample.digest.removeprefix("sha256:")
    else:
        found = sources.find(text, request, where)
    if found is None:
        near = near_names(text, [*present, *samples.names])
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        listed = f"a sample ({', '.join(samples.names)}), " if samples.names else ""
        raise ModelNotFoundError(
            f"{where}: {redacted(text)[:128]!r} is not known here.{hint} A pull takes {listed}{sources.takes}."
        )
    source, name, inline = found
    digest = agreed(digest, inline)
    if digest and isinstance(source, PartsSource):
        raise InvalidRequestError.at("sha256", "a model in parts has a digest for each of them; leave this one out.")
    return PullPlan(_name(name, request, owner=sources.folders), source, digest, kind, request.insecure)


def _name(found: str, request: PullRequest, *, owner: bool) -> str:
    """The model's name: the request's, else the one in the source. Raises InvalidRequestError."""
    if request.source:
        return validate_model_name(request.model, owner=owner)
    try:
        return validate_model_name(found, owner=owner)
    except InvalidRequestError as error:
        raise InvalidRequestError.from_error(
            error,
            f"{error} Choose another name: give it in `model`, and {without_secrets(request.model)!r} in `source`.",
        ) from None


def _http(text: str, request: PullRequest, where: str) -> tuple[HttpSource, str, str]:
    """The source, the file's name and the digest in the fragment."""
    try:
        source = HttpSource.parse(text, request.username, request.password)
    except ValueError:
        raise InvalidRequestError.at(where, f"{without_secrets(text)!r} is not a valid http(s) URL.") from None
    _, _, fragment = text.partition("#")
    digest = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else ""
    return source, source.file_name, _sha256(digest, where)


def _parts(source: LocalSource | HttpSource, file: str, where: str) -> PartsSource | None:
    """All parts of the model of which a source, named `file`, is one; None for a whole model. Stats local files."""
    try:
        names = part_names(file)
    except GgufError as error:
        raise InvalidRequestError.at(where, f"{error}.") from None
    if not names:
        return None
    if isinstance(source, HttpSource):
        return PartsSource(tuple(source.beside(name) for name in names))
    paths = [source.path.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if missing[_SHOWN:] else "")
        raise ModelNotFoundError(
            f"{where}: {file} is one of {len(names)} parts of a model; its folder lacks {shown}. Put all parts into "
            "one folder and pull any of them."
        )
    return PartsSource(tuple(LocalSource(path) for path in paths))
