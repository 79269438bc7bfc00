"""The request to pull a model, as the host sends it; `models.request` plans its pull."""

from __future__ import annotations

from dataclasses import dataclass

from engine_plugin.download.source import without_secrets

__all__ = ["PullRequest"]


@dataclass(frozen=True, slots=True, repr=False)
class PullRequest:
    """The PullModelRequest of the wire, with the additional fields `source` and `sha256`.

    `model` is a reference: a sample's name, a local path, a file:// or http(s) URL, or a repository on a hub. If
    `source` has the reference (or `model:OLD` for a present model), `model` is the name to store it under. `sha256`
    is 64 hex digits, with or without `sha256:`. `insecure` disables the check of TLS certificates and allows
    credentials over plain http. `model_type` is a service's name, which gives the model's kind. The repr has no
    secrets.
    """

    model: str
    source: str = ""
    sha256: str = ""
    insecure: bool = False
    username: str = ""
    password: str = ""
    model_type: str = ""

    def __repr__(self) -> str:
        return f"PullRequest(model={without_secrets(self.model)!r}, source={without_secrets(self.source)!r})"
