"""Every error that this package raises on purpose.

    EnginePluginError                     code 500
    ├── InvalidRequestError               400  the request is wrong; says which field
    ├── AuthError                         401  a key is missing or refused
    ├── NotFoundError                     404  no such service, model or plugin
    │   ├── ServiceNotFoundError
    │   └── ModelNotFoundError
    ├── DeadlineError                     408  the time that plugin.yaml or the host allows has passed
    ├── PreconditionError                 412  something must be done first
    │   ├── EngineNotInstalledError
    │   ├── ModelNotLoadedError
    │   ├── ModelUnusableError
    │   └── ModelInUseError
    ├── UnsupportedError                  501  this plugin or engine cannot do that
    ├── BadGatewayError                   502  the engine answered wrongly or broke off
    │   └── EngineDiedError               502  the engine's process ended during the call
    ├── UnavailableError                  503  the engine is not running, or busy
    │   └── EngineStartError              503  the engine could not be started
    ├── ManifestError                     500  plugin.yaml is wrong; carries its problems
    ├── InstallError                      500  an installation failed and was undone
    ├── DownloadError                     500  a file could not be fetched or verified
    │   └── PullError                     500  a model could not be fetched, verified or used
    └── PluginProcessError                500  host side: a plugin could not be launched, or died

An error is raised where it is detected, says what to do next, and is caught once, at the edge: the servicer
turns it into `code`, `message` and metadata, the CLI into a line on stderr and an exit status. The codes are those of
the wire (AOG plugin SDK, protocol/errors.go). Programs compare an error's class or its `id`, never its text;
docs/errors.md lists the ids (scripts/error_ids.py writes it).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from engine_plugin.redaction import sendable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "ERROR_FIELDS",
    "ERROR_ID",
    "MOST_FIELDS",
    "AuthError",
    "BadGatewayError",
    "DeadlineError",
    "DownloadError",
    "EngineDiedError",
    "EngineNotInstalledError",
    "EnginePluginError",
    "EngineStartError",
    "InstallError",
    "InvalidRequestError",
    "ManifestError",
    "ModelInUseError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelUnusableError",
    "NotFoundError",
    "PluginProcessError",
    "PreconditionError",
    "Problem",
    "PullError",
    "ServiceNotFoundError",
    "UnavailableError",
    "UnsupportedError",
    "error_about",
    "error_for_code",
]

ERROR_ID, ERROR_FIELDS = "error-id", "error-fields"
"""The keys under which metadata carries an error's id and its fields (docs/protocol.md)."""

MOST_FIELDS = 2048
"""The most bytes of the fields' JSON in metadata; gRPC clients accept 8 KiB of metadata in all."""

_LONGEST_VALUE = 1024


class EnginePluginError(Exception):
    """The root of the tree. The text is for people; programs compare the class or `id`."""

    code: ClassVar[int] = 500
    """The code on the wire."""
    id: str = "internal-error"
    """The kind of failure, in kebab-case: a class's own, or that of the catalogue's entry that was raised."""
    remedy: ClassVar[str] = "Look into the plugin's log for the details, and report them."
    """What to do, for docs/errors.md, unless the catalogue has an entry with this id, and its remedy."""
    names: ClassVar[tuple[str, ...]] = ()
    """The fields that an error of this class may have, beside those of `error_about`."""

    def __init__(self, message: str = "", **fields: Any) -> None:
        """`fields` say what the error is about, as JSON values; "" and None are left out."""
        super().__init__(message)
        self.fields: dict[str, Any] = {name: value for name, value in fields.items() if value not in ("", None)}

    @classmethod
    def from_error(cls, error: EnginePluginError, text: str = "") -> Self:
        """Convert an error to this class, for callers that document it, with another text or the same.

        The fields stay, and so does an id of the catalogue; a class's id becomes that of this class.
        """
        restated = cls(text or str(error), **error.fields)
        if error.id != type(error).id:
            restated.id = error.id
        return restated

    @property
    def message(self) -> str:
        """The text for the wire, logs and terminals: without secrets, and valid UTF-8."""
        return sendable(str(self))

    @property
    def reason(self) -> str:
        """The message of the failed side, to be quoted in another text; else the whole text."""
        return str(self.fields.get("reason") or self)

    @property
    def metadata(self) -> dict[str, str]:
        """The id and the fields for gRPC metadata: printable ASCII, bounded, without secrets."""
        return {ERROR_ID: self.id, ERROR_FIELDS: _compact(self.fields)}


def _compact(fields: Mapping[str, Any]) -> str:
    """The fields as one line of JSON. Long texts are cut; the last fields are dropped if all are too long."""
    import json  # not before the handshake: it takes 1 ms

    kept = {name: _plain(value) for name, value in fields.items()}
    while len(text := json.dumps(kept, separators=(",", ":"))) > MOST_FIELDS:
        kept.popitem()
    return text.replace("\x7f", "\\u007f")  # json leaves DEL as it is, and gRPC does not send it


def _plain(value: Any) -> str | int | float | bool:
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = sendable(str(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


@contextmanager
def error_about(**fields: Any) -> Iterator[None]:
    """Add fields to an error that leaves the block, unless it has them already.

    Called where a call's service or model is known.
    """
    try:
        yield
    except EnginePluginError as error:
        error.fields = {name: value for name, value in fields.items() if value} | error.fields
        raise


class InvalidRequestError(EnginePluginError):
    """The request is invalid; the message begins with the field's name."""

    code = 400
    id = "request-invalid"
    remedy = "Correct the field that `field` and the message name."
    names = ("field",)

    @classmethod
    def at(cls, field: str, what: str) -> Self:
        """The error for one field, such as `messages[0].content`; `what` says what is wrong with it."""
        return cls(f"{field}: {what}", field=field)


class AuthError(EnginePluginError):
    """A credential is missing or was refused."""

    code = 401
    id = "authentication-failed"
    remedy = "Correct the key or the account that the message names."


class NotFoundError(EnginePluginError):
    """A service, model or plugin does not exist."""

    code = 404
    id = "not-found"
    remedy = "Correct the name or the address in the message."


class ServiceNotFoundError(NotFoundError):
    """plugin.yaml declares no such service."""

    id = "service-missing"
    remedy = "Call one of the services that the message lists, or declare it in plugin.yaml."
    names = ("service",)


class ModelNotFoundError(NotFoundError):
    """A model is missing: `model` as requested, `pull` the reference to pull, "" if there is none."""

    id = "model-missing"
    names = ("model", "pull")

    @property
    def model(self) -> str:
        """The name that was not found."""
        return str(self.fields.get("model", ""))

    @property
    def pull(self) -> str:
        """The reference to pull; "" if there is none."""
        return str(self.fields.get("pull", ""))


class DeadlineError(EnginePluginError):
    """The time allowed for a call has passed; the engine's work on it was stopped."""

    code = 408
    id = "deadline-exceeded"


class PreconditionError(EnginePluginError):
    """The call is valid, but a step must come first."""

    code = 412
    id = "precondition-failed"
    remedy = "Take the step that the message names."


class EngineNotInstalledError(PreconditionError):
    """The engine's software is not on this machine; InstallEngine puts it there."""

    id = "engine-not-installed"


class ModelNotLoadedError(PreconditionError):
    """The model is not in memory."""

    id = "model-not-loaded"
    remedy = "Nothing: the next request loads the model."
    names = ("model",)


class ModelUnusableError(PreconditionError):
    """The engine cannot load the model's files; the message has the engine's reason."""

    id = "model-unusable"
    remedy = "Delete the model and pull it again, or pull another."
    names = ("model",)


class ModelInUseError(PreconditionError):
    """The model is answering requests and cannot be deleted now."""

    id = "model-in-use"
    remedy = "Try again when its requests have ended."
    names = ("model",)


class UnsupportedError(EnginePluginError):
    """This plugin or its engine does not support the request."""

    code = 501
    id = "unsupported"
    remedy = "Leave it out, or call a plugin whose engine can do it."


class BadGatewayError(EnginePluginError):
    """The engine's answer violates its protocol or broke off; `reason` is the engine's part of the text."""

    code = 502
    id = "engine-failed"
    remedy = "Try again; the engine's log may say why."
    names = ("reason",)


class EngineDiedError(BadGatewayError):
    """The engine's process ended during the call; the message has its exit code and last lines."""

    id = "engine-died"
    remedy = "Try again: the engine is restarted. Look at its last lines in the message if it dies again."


class UnavailableError(EnginePluginError):
    """The engine is not running, or has no room for another request; `reason` says why it cannot be reached."""

    code = 503
    id = "engine-unavailable"
    remedy = "Try again later; StartEngine if the engine is stopped."
    names = ("reason",)


class EngineStartError(UnavailableError):
    """The engine's process did not become ready; the message has its exit code and last lines."""

    id = "engine-start-failed"
    remedy = "Correct what the engine's last lines in the message say, then call StartEngine."


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem in a plugin.yaml: the place (1-based line, 0 for the whole file), what is wrong, and the fix."""

    file: str
    line: int
    what: str
    fix: str
    severity: str = "error"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.severity}: {self.what}. {self.fix}"


class ManifestError(EnginePluginError):
    """plugin.yaml is invalid. `problems` has every problem; the text has one on each line."""

    id = "manifest-invalid"
    remedy = "Correct plugin.yaml at `file` and `line`; `engine-plugin lint` lists all problems."
    names = ("file", "line")

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0] if self.problems else None
        place = {"file": first.file, "line": first.line or None} if first is not None else {}
        super().__init__("\n".join(str(problem) for problem in self.problems), **place)


class InstallError(EnginePluginError):
    """An installation failed; the previous one is untouched."""

    id = "install-failed"
    remedy = "Correct what the message names, then call InstallEngine again."


class DownloadError(EnginePluginError):
    """A file could not be downloaded or verified; valid partial data is kept to resume."""

    id = "download-failed"
    remedy = "Try again; the download resumes where possible."


class PullError(DownloadError):
    """A model could not be downloaded or verified, or the download is not a model."""

    id = "pull-failed"
    remedy = "Try again, or pull from another source."


class PluginProcessError(EnginePluginError):
    """The host library could not launch a plugin, or the plugin exited unexpectedly."""

    id = "plugin-process-failed"
    remedy = "Launch the plugin again; the message has its exit status and last lines."


_BY_CODE = {cls.code: cls for cls in EnginePluginError.__subclasses__() if "code" in vars(cls)}


def error_for_code(code: int, message: str) -> EnginePluginError:
    """The exception for the `code` and `message` of a plugin that sends no ids. Called by the host library."""
    return _BY_CODE.get(code, EnginePluginError)(message)
