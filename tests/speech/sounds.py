"""Synthetic audio for tests: 16 kHz mono s16le, and files of it in each format."""

from __future__ import annotations

import io
import math
import random
from array import array

from engine_plugin.speech import pcm
from engine_plugin.speech.subtitles import Segment

__all__ = ["Listener", "encoded", "mixed", "noise", "silence", "speech", "spoken", "tone", "wav"]

RATE = pcm.RATE
FRAME = 320  # samples: the length of a word is a multiple of it
WORD, GAP = 15, 4  # frames
_QUIET, _STEP = 2000, 40
_PATTERN = (1, 1, -1, -1, 1, 1, -1, -1)


def silence(seconds: float) -> bytes:
    return bytes(2 * round(seconds * RATE))


def tone(seconds: float, frequency: float = 440.0, amplitude: float = 0.3, rate: int = RATE) -> bytes:
    step = 2 * math.pi * frequency / rate
    return array("h", [round(32767 * amplitude * math.sin(step * n)) for n in range(round(seconds * rate))]).tobytes()


def noise(seconds: float, amplitude: float, seed: int = 1) -> bytes:
    drawn = random.Random(seed)  # noqa: S311  # noise
    scale = 32767 * amplitude
    return array("h", [round(scale * drawn.uniform(-1, 1)) for _ in range(round(seconds * RATE))]).tobytes()


def speech(seconds: float, amplitude: float = 0.3) -> bytes:
    """Harmonics of a voice whose level rises and falls like syllables, three to four per second."""
    step = 2 * math.pi / RATE
    made = array("h")
    for n in range(round(seconds * RATE)):
        loud = max(0.0, math.sin(3.5 * step * n))
        voice = sum(math.sin(step * 130 * k * n) / k for k in (1, 2, 4, 7, 11)) / 2 if loud else 0.0
        made.append(round(32767 * amplitude * loud * max(-1.0, min(1.0, voice))))
    return made.tobytes()


def mixed(first: bytes, second: bytes) -> bytes:
    """Mix two sounds; the shorter one ends earlier."""
    one, two = array("h", first), array("h", second)
    if len(one) < len(two):
        one, two = two, one
    for place, value in enumerate(two):
        one[place] = max(-32768, min(32767, one[place] + value))
    return one.tobytes()


def wav(samples: bytes, rate: int = RATE, channels: int = 1) -> bytes:
    return pcm.wav_header(len(samples), rate, channels) + samples


def spoken(first: int, count: int) -> bytes:
    """Words for a `Listener`: bursts whose loudness encodes their number, with short gaps between."""
    made = array("h")
    for number in range(first, first + count):
        made.extend([sign * (_QUIET + _STEP * number) for sign in _PATTERN] * (WORD * FRAME // len(_PATTERN)))
        made.extend([0] * (GAP * FRAME))
    return made.tobytes()


class Listener:
    """A model that transcribes `spoken` perfectly, except for a word that a window cuts in two."""

    def __init__(self) -> None:
        self.windows: list[float] = []
        """The length of each window in seconds."""

    def hear(self, samples: bytes) -> list[Segment]:
        self.windows.append(pcm.seconds(len(samples)))
        numbers = [self._number(samples[at : at + 2 * FRAME]) for at in range(0, len(samples), 2 * FRAME)]
        found: list[Segment] = []
        begin = 0
        for place in range(1, len(numbers) + 1):
            if place < len(numbers) and numbers[place] == numbers[begin]:
                continue
            number = numbers[begin]
            if number is not None:
                whole = place - begin == WORD
                text = f" word{number}" if whole else f" wo{place - begin}"
                found.append(Segment(begin * 0.02, place * 0.02, text))
            begin = place
        return found

    @staticmethod
    def _number(frame: bytes) -> int | None:
        loudest = max(array("h", frame))
        return (loudest - _QUIET) // _STEP if loudest >= _QUIET else None


def encoded(
    form: str,
    codec: str,
    samples: bytes,
    *,
    rate: int = RATE,
    layout: str = "mono",
    options: dict[str, str] | None = None,
) -> bytes:
    """A file of ffmpeg's format `form`, with options of its muxer. `samples` are mono s16le at `rate`."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"strict": "-2"})
        assert isinstance(stream, av.AudioStream)
        stream.layout = layout
        frame = av.AudioFrame("s16", "mono", len(samples) // 2)
        frame.planes[0].update(samples.ljust(frame.planes[0].buffer_size, b"\0"))
        frame.sample_rate, frame.pts = rate, 0
        stream.codec_context.open()
        shaper = av.AudioResampler(stream.format.name, layout, rate, stream.codec_context.frame_size or None)
        for shaped in (*shaper.resample(frame), *shaper.resample(None)):
            container.mux(stream.encode(shaped))
        container.mux(stream.encode(None))
    return file.getvalue()
