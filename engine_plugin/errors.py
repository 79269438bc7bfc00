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
    ├── UnavailableError                  503  the engine is not running, or busy
    │   └── EngineStartError              503  the engine could not be started
    ├── ManifestError                     500  plugin.yaml is wrong; carries its problems
    ├── InstallError                      500  an installation failed and was undone
    ├── DownloadError                     500  a file could not be fetched or verified
    │   └── PullError                     500  a model could not be fetched, verified or used
    └── PluginProcessError                500  host side: a plugin could not be launched, or died

An error is raised where it is known, says what to do next, and is caught once, at the edge: the servicer
turns it into `code` and `message`, the CLI into a line on stderr and an exit status. The codes are those of
the wire (AOG plugin SDK, protocol/errors.go).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine_plugin.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AuthError",
    "BadGatewayError",
    "DeadlineError",
    "DownloadError",
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
    "error_for_code",
]


class EnginePluginError(Exception):
    """The root of the tree. `code` is what the wire carries, the text is meant for a person."""

    code: ClassVar[int] = 500

    @property
    def message(self) -> str:
        """The text as the wire, a log and a terminal show it: without secrets."""
        return redacted(str(self))


class InvalidRequestError(EnginePluginError):
    """The caller's request cannot be served as it stands; the message begins with the field's name."""

    code = 400


class AuthError(EnginePluginError):
    """A credential is missing or was refused."""

    code = 401


class NotFoundError(EnginePluginError):
    """What was named does not exist."""

    code = 404


class ServiceNotFoundError(NotFoundError):
    """plugin.yaml declares no such service."""


class ModelNotFoundError(NotFoundError):
    """No such model is present: `model` as it was named, `pull` what to pull to have it, "" for no such source."""

    def __init__(self, message: str, *, model: str = "", pull: str = "") -> None:
        self.model = model
        self.pull = pull
        super().__init__(message)


class DeadlineError(EnginePluginError):
    """The time allowed for a call has passed; the engine's work on it was stopped."""

    code = 408


class PreconditionError(EnginePluginError):
    """The call is right, but something must be done before it."""

    code = 412


class EngineNotInstalledError(PreconditionError):
    """The engine's software is not on this machine; InstallEngine puts it there."""


class ModelNotLoadedError(PreconditionError):
    """The model is not in memory."""


class ModelUnusableError(PreconditionError):
    """The engine cannot load the model's files, now or later; the message holds the engine's reason."""


class ModelInUseError(PreconditionError):
    """The model is answering requests and cannot be deleted now."""


class UnsupportedError(EnginePluginError):
    """This plugin or its engine cannot do what was asked, now or later."""

    code = 501


class BadGatewayError(EnginePluginError):
    """The engine's answer is not what its protocol says, or broke off."""

    code = 502


class UnavailableError(EnginePluginError):
    """The engine is not running, or has no room for another request."""

    code = 503


class EngineStartError(UnavailableError):
    """The engine's process did not become ready; the message holds its exit code and last lines."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a plugin.yaml: where (1-based line, 0 when the whole file), what, and how to fix it."""

    file: str
    line: int
    what: str
    fix: str
    severity: str = "error"

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.severity}: {self.what}. {self.fix}"


class ManifestError(EnginePluginError):
    """plugin.yaml cannot be used. `problems` holds each complaint; the text is one a line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class InstallError(EnginePluginError):
    """An installation failed; what was there before is untouched."""


class DownloadError(EnginePluginError):
    """A file could not be fetched or verified; what arrived is kept for resuming where that is sound."""


class PullError(DownloadError):
    """A model could not be fetched or verified, or what was fetched is none."""


class PluginProcessError(EnginePluginError):
    """A plugin could not be launched by the host library, or ended while it was needed."""


_BY_CODE: dict[int, type[EnginePluginError]] = {
    cls.code: cls
    for cls in (
        InvalidRequestError,
        AuthError,
        NotFoundError,
        DeadlineError,
        PreconditionError,
        UnsupportedError,
        BadGatewayError,
        UnavailableError,
    )
}


def error_for_code(code: int, message: str) -> EnginePluginError:
    """The exception for a `code`/`message` pair of the wire. Called by the host library."""
    return _BY_CODE.get(code, EnginePluginError)(message)
