"""The API key of the server: read from the environment, sent only where allowed, never shown in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.errors import EnginePluginError, PreconditionError
from engine_plugin.redaction import entered

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.engines.openai.address import BaseUrl
    from engine_plugin.engines.openai.options import OpenAIOptions

__all__ = ["key_error", "key_headers"]


def key_headers(options: OpenAIOptions, environ: Mapping[str, str], base: BaseUrl) -> dict[str, str]:
    """The headers with the key for a server; empty if it gets no key.

    Raises PreconditionError for a key that would be sent unencrypted, or that is not valid in a header.
    """
    if options.send_key == "never" or (options.send_key == "auto" and base.is_loopback):
        return {}
    key = entered(environ.get(options.key_variable, ""))
    if not key:
        return {}
    if base.scheme != "https" and not base.is_loopback and not options.allow_plain_http:
        raise catalogue.KEY_UNSAFE.error(
            address=base.url, variable=options.key_variable, option="engine.allow_plain_http"
        )
    if not (key.isascii() and key.isprintable()):
        raise PreconditionError(
            f"{options.key_variable}: the key contains invalid characters, such as a line break. Export it again"
        )
    return {"authorization": f"Bearer {key}"}


def key_error(
    options: OpenAIOptions, environ: Mapping[str, str], base: BaseUrl, reason: str, *, sent: bool
) -> EnginePluginError:
    """The error for a server that rejects the key that was sent, or that requires one."""
    variable = options.key_variable
    if sent:
        return catalogue.KEY_REFUSED.error(server="the server", address=base.url, reason=reason, variable=variable)
    if environ.get(variable) and options.send_key != "always":
        return PreconditionError(
            f"the server at {base.url} requires a key, but engine.send_key does not allow to send it. "
            "Set send_key: always in plugin.yaml"
        )
    return catalogue.KEY_MISSING.error(server="the server", address=base.url, variable=variable)
