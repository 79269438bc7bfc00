"""The options of live transcription, in plugin.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["LiveOptions"]


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"min": low, "max": high})


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How a live stream becomes sentences; keys of plugin.yaml. Times are seconds of audio, levels are decibels."""

    window: float = _number(12.0, 2, 28)
    """The most audio that is given to the model at once."""

    overlap: float = _number(2.0, 0.2, 7)
    """How much of what is transcribed already the next window of a long sentence hears again; at most a quarter of
    `window` is used."""

    step: float = _number(1.0, 0.1, 28)
    """How much new speech a partial sentence waits for."""

    silence: float = _number(0.7, 0.1, 10)
    """The pause that ends a sentence."""

    longest_sentence: float = _number(30.0, 2, 600)
    """After so much speech without a pause a sentence is ended where it is quietest."""

    shortest_speech: float = _number(0.1, 0.02, 2)
    """Sound that is shorter begins no sentence."""

    speech_threshold: float = _number(8.0, 3, 40)
    """How far above the background speech must be."""

    quietest: float = _number(-72.0, -96, -20)
    """The background is never taken to be quieter, relative to full scale: speech begins `speech_threshold` above."""

    lead: float = _number(0.3, 0, 2)
    """How much of what came before and after the speech the model hears, too."""

    max_pending: float = _number(20.0, 1, 600)
    """How much speech may wait to be transcribed before no more messages are read."""
