"""A call's parameters, named as OpenAI names them, as OpenVINO GenAI's GenerationConfig.

The pipeline ignores unknown names and accepts nearly any value, so that everything is checked here.
"""

from __future__ import annotations

import secrets
from typing import Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import integer, number, optional
from openvino_server.pipelines import reason

__all__ = ["MOST_CHOICES", "Parameters", "Params"]

MOST_CHOICES = 128
"""The most answers to one prompt."""

_SEEDS = 1 << 31
_MOST = (1 << 31) - 1

Parameters = dict[str, Any]


class Params:
    """The checked parameters of a call. Raises InvalidRequestError."""

    def __init__(self, params: Parameters, best_of_limit: int, tokens_limit: int) -> None:
        for name in _UNSUPPORTED:
            if params.get(name):
                raise InvalidRequestError.at(name, "OpenVINO does not support it; leave it out")
        most = min(MOST_CHOICES, best_of_limit)
        self.n = integer(params, "n", 1, most) or 1
        self.best_of = integer(params, "best_of", self.n, most) or self.n
        name = "max_completion_tokens" if params.get("max_completion_tokens") is not None else "max_tokens"
        unlimited = params.get(name) == -1
        self.max_tokens = (not unlimited and integer(params, name, 1, tokens_limit or _MOST)) or tokens_limit
        stop = params.get("stop") or []
        self.stops = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
        self.keep_stop = bool(optional(params, "include_stop_str_in_output", bool))
        self.ignore_eos = bool(optional(params, "ignore_eos", bool))
        seed = integer(params, "seed", -(1 << 63), (1 << 63) - 1)
        if seed is None or seed < 0:
            seed = secrets.randbelow(_SEEDS)  # the pipeline's default is the same for all calls
        self.seed: int = seed
        self.logprobs = self._logprobs(params)
        self._numbers = {
            name: value for name, low, high in _RANGES if (value := number(params, name, low, high)) is not None
        }
        self._top_k = integer(params, "top_k", -1, _MOST)
        self._min_tokens = integer(params, "min_tokens", 0, _MOST) or 0

    @staticmethod
    def _logprobs(params: Parameters) -> bool:
        """Whether to return log probabilities. The pipeline computes that of the chosen token only."""
        wanted = params.get("logprobs")
        name = "top_logprobs"
        if wanted is not None and not isinstance(wanted, bool):
            name, wanted = "logprobs", True  # of completions: how many candidates
        count = integer(params, name, 0, 20) or 0
        if count and not wanted:
            raise InvalidRequestError.at("top_logprobs", "needs logprobs to be true")
        if count > 1:
            raise InvalidRequestError.at(
                name, f"OpenVINO returns the chosen token's only; the maximum is 1, not {count}"
            )
        return bool(wanted)

    def config(self, base: Any, room: int, grammar: Any, seed: int) -> Any:
        """A GenerationConfig for one sequence, over a fresh copy of the model's own. `room` is in tokens."""
        base.max_new_tokens = min(self.max_tokens or room, room)
        base.ignore_eos = self.ignore_eos
        base.rng_seed = seed
        base.apply_chat_template = False
        base.num_return_sequences = 1
        base.min_new_tokens = min(self._min_tokens, base.max_new_tokens)
        given = self._numbers
        for name, value in given.items():
            setattr(base, name, value)
        if self._top_k is not None:
            base.top_k = self._top_k if self._top_k > 0 else (1 << 63)
        if "temperature" in given:
            base.do_sample = given["temperature"] > 0
        elif given.keys() & {"top_p", "min_p"} or self._top_k is not None:
            base.do_sample = True
        if not base.do_sample:
            base.temperature = 1.0
        if self.logprobs or self.best_of > self.n:
            base.logprobs = 1
        if grammar is not None:
            base.structured_output_config = grammar
        try:
            base.validate()
        except RuntimeError as error:
            raise InvalidRequestError.at("params", reason(error)) from error
        return base


_UNSUPPORTED = ("logit_bias", "suffix")

_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-6, 100.0),
)
