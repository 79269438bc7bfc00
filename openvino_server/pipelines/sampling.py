"""A call's parameters, named as OpenAI names them, as OpenVINO GenAI's GenerationConfig.

The pipeline ignores unknown names and accepts nearly any value, so that everything is checked here.
"""

from __future__ import annotations

import secrets
from typing import Any

from openvino_server.errors import RequestError
from openvino_server.fields import flag, number, whole
from openvino_server.pipelines import reason

__all__ = ["Parameters", "Params"]

_SEEDS = 1 << 31

Parameters = dict[str, Any]


class Params:
    """The checked parameters of a call. Raises RequestError that names the field."""

    def __init__(self, params: Parameters, best_of_limit: int, tokens_limit: int) -> None:
        for name in _UNSUPPORTED:
            if params.get(name):
                raise RequestError(f"{name}: OpenVINO does not support it; leave it out")
        self.n = whole(params, "n", 1, 128, 1)
        self.best_of = whole(params, "best_of", 1, 128, self.n)
        if self.best_of < self.n:
            raise RequestError(f"best_of: must be at least n, {self.n}")
        if self.best_of > best_of_limit:
            raise RequestError(f"{'best_of' if params.get('best_of') else 'n'}: at most {best_of_limit} are allowed")
        name = "max_completion_tokens" if params.get("max_completion_tokens") is not None else "max_tokens"
        unlimited = params.get(name) == -1
        self.max_tokens = 0 if unlimited else whole(params, name, 1, (1 << 31) - 1, 0)
        if tokens_limit:
            if self.max_tokens > tokens_limit:
                raise RequestError(f"{name}: at most {tokens_limit} are allowed")
            self.max_tokens = self.max_tokens or tokens_limit
        self.stops = _stops(params.get("stop"))
        self.keep_stop = flag(params, "include_stop_str_in_output", False)
        self.ignore_eos = flag(params, "ignore_eos", False)
        self.seed = whole(params, "seed", -(1 << 63), (1 << 63) - 1, -1)
        if self.seed < 0:
            self.seed = secrets.randbelow(_SEEDS)  # the pipeline's default is the same for all calls
        self.logprobs = self._logprobs(params)
        self._numbers = {
            name: value for name, low, high in _RANGES if (value := number(params, name, low, high)) is not None
        }
        self._top_k = whole(params, "top_k", -1, 1 << 31, None)
        self._min_tokens = whole(params, "min_tokens", 0, 1 << 31, 0)

    @staticmethod
    def _logprobs(params: Parameters) -> bool:
        """Whether to return log probabilities. The pipeline computes that of the chosen token only."""
        wanted = params.get("logprobs")
        name = "top_logprobs"
        if wanted is not None and not isinstance(wanted, bool):
            name, wanted = "logprobs", True  # of completions: how many candidates
        count = whole(params, name, 0, 20, 0)
        if count and not wanted:
            raise RequestError("top_logprobs: needs logprobs to be true")
        if count > 1:
            raise RequestError(f"{name}: OpenVINO returns the chosen token's only; the maximum is 1, not {count}")
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
            raise RequestError(f"params: {reason(error)}") from error
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


def _stops(given: Any) -> list[str]:
    if given is None:
        return []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError("stop: must be a string or a list of strings")
    return [stop for stop in stops if stop]
