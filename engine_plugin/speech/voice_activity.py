"""Voice activity detection by energy above an adaptive background, with hysteresis.

Pure Python, 1 ms of processor time per second of audio: a stream of raw samples needs no process, package or model.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from operator import add, mul

__all__ = ["FRAME_BYTES", "FRAME_SECONDS", "LOUDEST_FIRST_BACKGROUND", "VoiceActivityDetector", "level"]

FRAME_BYTES = 640
"""A frame: 20 ms of 16 kHz mono s16le."""

FRAME_SECONDS = 0.02

_EMPHASIS = 0.9
_SILENCE = -96.0
_FULL_SCALE = 32768.0**2 * 4  # for the sum of two samples
_BIN = 25  # frames, whose quietest one is a measure of the background
_BINS = 8  # the background is measured over the last 4 s
_SMOOTHING = 0.4
_STEADY = 3.0  # decibels; the level of speech varies more within two bins
_LOUDEST_BACKGROUND = -20.0
LOUDEST_FIRST_BACKGROUND = -45.0
"""Decibels. The highest background level while all frames so far may be speech."""

_WARM_UP = 50  # frames


def level(frame: bytes) -> float:
    """The level of a frame in the band of speech, in decibels relative to full scale; -96 for digital silence.

    Pairs of samples are added (8 kHz, less hiss), and a first-order pre-emphasis, computed from energy and
    autocorrelation without an additional pass, attenuates hum and rumble. A constant offset is removed.
    """
    samples = array("h", frame)
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


class VoiceActivityDetector:
    """Decides for each frame, by its level, whether it is speech.

    Speech begins when most of `attack` frames are `threshold` decibels above the background, and ends below half of
    that. The background is the quietest level of the last four seconds, at least `quietest`: it follows a fan that is
    switched on, and a pause between two words is enough to measure it.
    """

    def __init__(self, threshold: float, quietest: float, attack: int) -> None:
        self._threshold = threshold
        self._quietest = quietest
        self._recent: deque[bool] = deque(maxlen=max(1, attack))
        self._smooth = _SILENCE
        self._bins: deque[float] = deque(maxlen=_BINS)
        self._lowest, self._highest = 0.0, _SILENCE  # levels of the current bin
        self._was_steady = False
        self._frames_seen = 0
        self.speaking = False

    @property
    def background(self) -> float:
        """The level of the background, in decibels."""
        lowest = min((*self._bins, self._lowest))
        cap = LOUDEST_FIRST_BACKGROUND if self._frames_seen < _WARM_UP else _LOUDEST_BACKGROUND
        return max(self._quietest, min(lowest, cap))

    def update(self, loudness: float) -> bool:
        """Whether a frame of this level is speech. The caller bridges the pauses between words."""
        background = self.background
        above = loudness - background
        self._track_background(loudness)
        self._recent.append(above >= self._threshold)
        if self.speaking:
            self.speaking = above >= self._threshold / 2
        else:
            attack = self._recent.maxlen or 1
            self.speaking = self._recent[-1] and sum(self._recent) * 4 >= attack * 3
        return self.speaking

    def _track_background(self, loudness: float) -> None:
        """Track the minimum of the smoothed level, so that single frames do not count."""
        if not self._frames_seen:
            self._smooth = loudness
        self._frames_seen += 1
        self._smooth += _SMOOTHING * (loudness - self._smooth)
        self._lowest = min(self._lowest, self._smooth)
        self._highest = max(self._highest, self._smooth)
        if self._frames_seen % _BIN == 0:
            self._end_bin()

    def _end_bin(self) -> None:
        steady = self._highest - self._lowest < _STEADY
        if steady and self._was_steady:
            self._bins.clear()  # a steady sound is background, even if new and loud
        self._bins.append(self._lowest)
        self._was_steady = steady
        self._lowest, self._highest = 0.0, _SILENCE
