"""The options of speech recognition in plugin.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["AudioLimits", "LiveOptions"]


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"min": low, "max": high})


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """Limits of the audio of requests. Times are seconds."""

    longest: float = _number(3600.0, 1, 86_400)
    """The longest accepted recording. One hour takes about 115 MB of memory while it is transcribed."""

    timeout: float = _number(120.0, 1, 86_400)
    """How long decoding one recording may take."""

    max_live: int = _number(16, 1, 1000)
    """How many live streams are decoded at the same time;

    further ones are rejected with 503. Each decoder takes 37 MB of memory, 13 MB of it private. Raw 16 kHz samples
    need no decoder and do not count.
    """


@dataclass(frozen=True, slots=True)
class LiveOptions:
    """How a live stream is split into sentences. Times are seconds of audio, levels are decibels."""

    window: float = _number(12.0, 2, 28)
    """The longest audio that one transcription gets."""

    overlap: float = _number(2.0, 0.2, 7)
    """How much of the transcribed audio the next window of a long sentence repeats; at most a quarter of `window`."""

    step: float = _number(1.0, 0.1, 28)
    """How much new speech each partial sentence needs."""

    silence: float = _number(0.7, 0.1, 10)
    """The pause that ends a sentence."""

    longest_sentence: float = _number(30.0, 2, 600)
    """Speech of this length without a pause is split where it is quietest."""

    shortest_speech: float = _number(0.1, 0.02, 2)
    """Shorter sounds do not begin a sentence."""

    speech_threshold: float = _number(8.0, 3, 40)
    """How far the level of speech must be above the background."""

    quietest: float = _number(-72.0, -96, -20)
    """The lowest level of the background, relative to full scale. Speech is at least `speech_threshold` above it."""

    lead: float = _number(0.3, 0, 2)
    """How much audio before and after the speech is transcribed with it."""

    max_pending: float = _number(20.0, 1, 600)
    """How much speech may wait to be transcribed. While more waits, no messages are read."""
