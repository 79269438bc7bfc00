"""What an answer cost: the counts and nanoseconds of Ollama's last line, as OpenAI's usage and in words of speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["added", "timings", "usage"]

_FIELDS = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)
_TOO_MUCH = 1 << 63


def _count(last: Mapping[str, Any], field: str) -> int:
    """One below zero, as of a clock that was set back, is none."""
    value = last.get(field) or 0
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _TOO_MUCH:
        raise BadGatewayError(f"the engine's {field} is no count")
    return max(0, int(value))


def usage(lasts: Sequence[Mapping[str, Any]], choices_each: int = 1) -> dict[str, int]:
    """The tokens of all choices, from the last line of each; a prompt counts once for its `choices_each` choices."""
    prompt = sum(_count(last, "prompt_eval_count") for last in lasts[::choices_each])
    completion = sum(_count(last, "eval_count") for last in lasts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def added(lasts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The metrics of several answers together."""
    return {field: sum(_count(last, field) for last in lasts) for field in _FIELDS}


def timings(last: Mapping[str, Any]) -> dict[str, float]:
    """Counts, milliseconds and tokens a second, named as llama.cpp's server does; {} when the server told none.

    A count without a time has no speed: 0.
    """
    if not any(last.get(field) for field in _FIELDS):
        return {}
    prompt, predicted = _count(last, "prompt_eval_count"), _count(last, "eval_count")
    prompt_ns, predicted_ns = _count(last, "prompt_eval_duration"), _count(last, "eval_duration")
    return {
        "prompt_n": prompt,
        "prompt_ms": _milliseconds(prompt_ns),
        "prompt_per_second": _speed(prompt, prompt_ns),
        "predicted_n": predicted,
        "predicted_ms": _milliseconds(predicted_ns),
        "predicted_per_second": _speed(predicted, predicted_ns),
        "load_ms": _milliseconds(_count(last, "load_duration")),
        "total_ms": _milliseconds(_count(last, "total_duration")),
    }


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _speed(tokens: int, nanoseconds: int) -> float:
    return round(tokens * 1e9 / nanoseconds, 3) if nanoseconds > 0 else 0.0
