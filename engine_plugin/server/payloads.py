"""JSON requests of ProviderService, parsed into the package's types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.jsontext import BRIEF
from engine_plugin.models.pull_request import PullRequest
from engine_plugin.services import parse_request
from engine_plugin.services.base import optional, require

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["model_name", "model_names", "pull_request"]

_FIELD = "request_json"
_MOST_NAMES = 1000  # each is unloaded by its own task


def model_name(request_json: bytes) -> str:
    """`{"model": …}`. Raises InvalidRequestError."""
    name: str = require(parse_request(request_json, _FIELD, BRIEF), "model", str)
    return name


def model_names(request_json: bytes) -> Sequence[str]:
    """Parse `{"models": […]}`; duplicates are dropped. Raises InvalidRequestError."""
    names: list[Any] = require(parse_request(request_json, _FIELD, BRIEF), "models", list)
    if len(names) > _MOST_NAMES:
        raise InvalidRequestError.at(
            "models", f"{len(names)} are too many; at most {_MOST_NAMES} can be named at once"
        )
    if not names or not all(isinstance(name, str) for name in names):
        raise InvalidRequestError.at("models", "must be a list of model names, at least one")
    return list(dict.fromkeys(names))


def pull_request(request_json: bytes) -> PullRequest:
    """Parse PullModelRequest; `name` is an older name of `model`. Raises InvalidRequestError."""
    shape = parse_request(request_json, _FIELD, BRIEF)
    if not shape.get("model"):
        shape["model"] = shape.get("name")
    texts = {field: optional(shape, field, str) or "" for field in ("source", "sha256", "model_type")}
    # Not through `optional`, whose error would quote the secret.
    for field in ("username", "password"):
        if not isinstance(shape.get(field) or "", str):
            raise InvalidRequestError.at(field, "must be a string")
        texts[field] = shape.get(field) or ""
    return PullRequest(model=require(shape, "model", str), insecure=bool(optional(shape, "insecure", bool)), **texts)
