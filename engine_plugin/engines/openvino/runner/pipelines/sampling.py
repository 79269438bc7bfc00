"""A call's parameters, named as OpenAI names them, as OpenVINO GenAI's GenerationConfig.

The pipeline ignores names that it does not know and takes nearly any value, so all is checked here. A grammar that
cannot be compiled would break the pipeline for all of its calls: `Grammars` tries each out before.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from engine_plugin.engines.openvino.runner.pipelines import RequestError, reason

__all__ = ["Grammars", "Params", "flag", "number", "whole"]

_SEEDS = 1 << 31
_PROVEN = 256  # grammars remembered

Parameters = dict[str, Any]


class Params:
    """What a call wants, checked. Raises RequestError that names the field."""

    def __init__(self, params: Parameters, best_of_limit: int, tokens_limit: int) -> None:
        self.n = whole(params, "n", 1, 128, 1)
        self.best_of = whole(params, "best_of", 1, 128, self.n)
        if self.best_of < self.n:
            raise RequestError(f"best_of: must be at least n, {self.n}")
        if self.best_of > best_of_limit:
            raise RequestError(f"{'best_of' if params.get('best_of') else 'n'}: at most {best_of_limit} are allowed")
        name = "max_completion_tokens" if params.get("max_completion_tokens") is not None else "max_tokens"
        self.max_tokens = whole(params, name, 1, (1 << 31) - 1, 0)
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
        """Whether to tell them. More candidates than the chosen token the pipeline does not know."""
        wanted = params.get("logprobs")
        if wanted is not None and not isinstance(wanted, bool):
            return whole(params, "logprobs", 0, 20, 0) is not None  # of completions: how many candidates
        if whole(params, "top_logprobs", 0, 20, 0) and not wanted:
            raise RequestError("top_logprobs: needs logprobs to be true")
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


_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-6, 100.0),
)


def whole(params: Parameters, name: str, low: int, high: int, default: Any) -> Any:
    """A whole number within bounds, or the default. Raises RequestError."""
    value = params.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}: must be a whole number from {low} to {high}, not {value!r}")
    return value


def number(params: Parameters, name: str, low: float, high: float) -> float | None:
    """A number within bounds, if there is one. Raises RequestError."""
    value = params.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"{name}: must be a number from {low:g} to {high:g}, not {value!r}")
    return float(value)


def flag(params: Parameters, name: str, default: bool) -> bool:
    """True or false. Raises RequestError."""
    value = params.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name}: must be true or false, not {value!r}")
    return value


def _stops(given: Any) -> list[str]:
    if given is None:
        return []
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError("stop: must be a string or a list of strings")
    return [stop for stop in stops if stop]


class Grammars:
    """Structured outputs, tried out on a model of nothing with the real model's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._proven: OrderedDict[str, None] = OrderedDict()
        self._prover: Any = None

    def wanted(self, params: Parameters) -> Any:
        """The StructuredOutputConfig that a call asks for, or None. Raises RequestError when it is no good."""
        import openvino_genai

        found = _wanted(params)
        if found is None:
            return None
        field, kind, text = found
        config = openvino_genai.StructuredOutputConfig(**{kind: text})
        self.prove(config, f"{kind}:{text}", field)
        return config

    def prove(self, config: Any, key: str, field: str) -> None:
        """Raises RequestError when it cannot be compiled. The key stands for the grammar."""
        import openvino_genai

        if key in self._proven:
            self._proven.move_to_end(key)
            return
        if self._prover is None:
            self._prover = _model_of_nothing(self._tokenizer)
        trial = openvino_genai.GenerationConfig(max_new_tokens=1, apply_chat_template=False)
        trial.set_eos_token_id(max(self._tokenizer.get_eos_token_id(), 0))
        trial.structured_output_config = config
        try:
            self._prover.generate("a", trial)
        except RuntimeError as error:
            raise RequestError(f"{field}: cannot be followed: {_complaint(error)}") from error
        self._proven[key] = None
        if len(self._proven) > _PROVEN:
            self._proven.popitem(last=False)


def _complaint(error: RuntimeError) -> str:
    """The compiler's words, without the place in its source."""
    last = str(error).strip().splitlines()[-1]
    _, found, words = last.partition(".cc:")
    return (words.partition(": ")[2] if found else last).strip() or last


def _wanted(params: Parameters) -> tuple[str, str, str] | None:
    """The field, GenAI's name for the kind, and the grammar."""
    form = params.get("response_format")
    if form is not None:
        return _response_format(form)
    nested = params.get("structured_outputs") or params.get("guided_decoding") or {}
    if not isinstance(nested, dict):
        raise RequestError("structured_outputs: must be an object")
    for name, kind in (("json", "json_schema"), ("regex", "regex"), ("grammar", "grammar"), ("choice", "choice")):
        for field, value in ((f"guided_{name}", params.get(f"guided_{name}")), (name, nested.get(name))):
            if value is not None:
                return field, *_grammar(field, kind, value)
    if params.get("grammar"):
        return "grammar", *_grammar("grammar", "grammar", params["grammar"])
    return None


def _response_format(form: Any) -> tuple[str, str, str] | None:
    kind = form.get("type") if isinstance(form, dict) else None
    field = "response_format"
    if kind == "text":
        return None
    if kind == "json_object":
        return field, *_grammar(field, "json_schema", form.get("schema") or {"type": "object"})
    if kind == "json_schema":
        given = form.get("json_schema")
        schema = given.get("schema") if isinstance(given, dict) and "schema" in given else given or form.get("schema")
        if not isinstance(schema, dict):
            raise RequestError("response_format.json_schema: must be an object with a schema")
        return field, *_grammar(field, "json_schema", schema)
    if kind in ("regex", "grammar", "ebnf"):
        value = (
            form.get("pattern") or form.get("regex") if kind == "regex" else form.get("grammar") or form.get("ebnf")
        )
        return field, *_grammar(field, "regex" if kind == "regex" else "grammar", value)
    raise RequestError("response_format.type: must be one of text, json_object, json_schema, regex, grammar")


def _grammar(field: str, kind: str, value: Any) -> tuple[str, str]:
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise RequestError(f"{field}: must be a list of texts")
        return "grammar", "root ::= " + " | ".join(json.dumps(item, ensure_ascii=False) for item in value)
    if kind == "json_schema" and isinstance(value, dict):
        return kind, json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{field}: must be a text{' or a schema' if kind == 'json_schema' else ''}, not empty")
    return kind, value


def _model_of_nothing(tokenizer: Any) -> Any:
    """A language model to which all tokens are as likely: it costs nothing, but compiles grammars as real ones do."""
    import numpy as np
    import openvino
    import openvino_genai
    from openvino import opset13 as ops

    inputs = [
        ops.parameter([-1] * rank, kind, name=name)
        for name, rank, kind in (
            ("input_ids", 2, np.int64),
            ("attention_mask", 2, np.int64),
            ("beam_idx", 1, np.int32),
        )
    ]
    for parameter in inputs:
        parameter.output(0).set_names({parameter.get_friendly_name()})
    nothing = ops.constant(np.float32(0))
    ids, *others = [ops.multiply(ops.convert(parameter, "f32"), nothing) for parameter in inputs]
    for other, rank in zip(others, (2, 1), strict=True):
        ids = ops.add(ids, ops.reduce_sum(other, ops.constant(list(range(rank))), keep_dims=False))
    size = max(tokenizer.get_vocab().values()) + 1
    logits = ops.add(ops.unsqueeze(ids, ops.constant(2)), ops.constant(np.zeros((1, 1, size), np.float32)))
    logits.output(0).set_names({"logits"})
    model = openvino.Model([ops.result(logits)], inputs, "nothing")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nothing.xml"
        openvino.serialize(model, file)
        text, weights = file.read_text(encoding="utf-8"), np.fromfile(file.with_suffix(".bin"), np.uint8)
    return openvino_genai.LLMPipeline(text, openvino.Tensor(weights), tokenizer, "CPU", ATTENTION_BACKEND="SDPA")
