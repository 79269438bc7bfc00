"""The models of an Ollama server: what is there, what it can do, how it gets there and goes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ModelFacts"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a request's translation must know of its model.

    `name` is the server's name of it, `features` are words of FEATURES. `context_length` is what it was made for in
    tokens, when the server or plugin.yaml says so (never an estimate). `num_ctx` is what to ask for, None for
    whatever the server has: asking for all that a model can take would cost memory nobody wanted spent. `native`
    says that the host speaks Ollama's own JSON.
    """

    name: str
    kind: str
    features: frozenset[str]
    context_length: int | None
    num_ctx: int | None
    parameter_size: str
    native: bool
