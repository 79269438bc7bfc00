"""Voice activity: where in a stream of samples somebody speaks.

Energy against an adaptive background, with hysteresis, in pure Python: 1 ms of processor time for a second of
audio, so that a stream of raw samples needs no process, no package and no model of its own.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from operator import add, mul
from sys import byteorder

__all__ = ["FRAME_BYTES", "FRAME_SECONDS", "LOUDEST_FIRST_BACKGROUND", "VoiceDetector", "level"]

RATE = 16_000
FRAME_BYTES = 640
"""A frame: 20 ms of 16 kHz mono s16le."""

FRAME_SECONDS = 0.02

_EMPHASIS = 0.9
_SILENCE = -96.0
_FULL_SCALE = 32768.0**2 * 4  # of a sum of two samples
_BIN = 25  # frames in whose quietest moment the background shows
_BINS = 8  # so the background is what was there in the last 4 s
_SMOOTHING = 0.4
_STEADY = 3.0  # decibels: speech is never so even for two bins
_LOUDEST_BACKGROUND = -20.0
LOUDEST_FIRST_BACKGROUND = -45.0
"""Decibels. The most that counts as background as long as everything heard may have been speech."""

_UNSURE = 50  # frames


def level(frame: bytes) -> float:
    """A frame's loudness in the band of speech, in decibels relative to full scale; -96 for digital silence.

    Neighbours are added (8 kHz, less hiss) and what is low, hum and rumble, is weakened by a first-order
    pre-emphasis, computed from energy and autocorrelation without a pass of its own. A constant offset counts for
    nothing.
    """
    samples = array("h", frame)
    if byteorder == "big":
        samples.byteswap()
    pairs = list(map(add, samples[::2], samples[1::2]))
    energy: float = sum(map(mul, pairs, pairs))
    if not energy:
        return _SILENCE
    count = len(pairs)
    mean = sum(pairs) / count
    energy -= mean * mean * count
    neighbours = sum(map(mul, pairs, pairs[1:])) - mean * mean * (count - 1)
    power = (energy * (1 + _EMPHASIS**2) - 2 * _EMPHASIS * neighbours) / count
    return max(_SILENCE, 10 * math.log10(max(power / _FULL_SCALE, 1e-10)))


class VoiceDetector:
    """Says of each frame's level whether it belongs to speech.

    Speech begins when most of `attack` frames are `threshold` decibels above the background, and a frame is quiet
    again below half of that. The background is the quietest of the last four seconds, never below `quietest`: it
    follows a fan that is switched on, and a pause between two words is enough for it to be found again.
    """

    def __init__(self, threshold: float, quietest: float, attack: int) -> None:
        self._threshold = threshold
        self._quietest = quietest
        self._recent: deque[bool] = deque(maxlen=max(1, attack))
        self._smooth = _SILENCE
        self._bins: deque[float] = deque(maxlen=_BINS)
        self._lowest, self._highest = 0.0, _SILENCE  # of the current bin
        self._was_steady = False
        self._heard = 0
        self.speaking = False

    @property
    def background(self) -> float:
        """The level of what is always there."""
        lowest = min((*self._bins, self._lowest))
        cap = LOUDEST_FIRST_BACKGROUND if self._heard < _UNSURE else _LOUDEST_BACKGROUND
        return max(self._quietest, min(lowest, cap))

    def hear(self, loudness: float) -> bool:
        """Whether the frame is speech. A silence between words is not: its length is for the caller to judge."""
        background = self.background
        above = loudness - background
        self._learn(loudness)
        self._recent.append(above >= self._threshold)
        if self.speaking:
            self.speaking = above >= self._threshold / 2
        else:
            attack = self._recent.maxlen or 1
            self.speaking = self._recent[-1] and sum(self._recent) * 4 >= attack * 3
        return self.speaking

    def _learn(self, loudness: float) -> None:
        """Follow the background: the minimum of what was smoothed, so that one odd frame does not count."""
        if not self._heard:
            self._smooth = loudness
        self._heard += 1
        self._smooth += _SMOOTHING * (loudness - self._smooth)
        self._lowest = min(self._lowest, self._smooth)
        self._highest = max(self._highest, self._smooth)
        if self._heard % _BIN == 0:
            self._end_bin()

    def _end_bin(self) -> None:
        steady = self._highest - self._lowest < _STEADY
        if steady and self._was_steady:
            self._bins.clear()  # a sound that does not change is background, however new and loud
        self._bins.append(self._lowest)
        self._was_steady = steady
        self._lowest, self._highest = 0.0, _SILENCE
