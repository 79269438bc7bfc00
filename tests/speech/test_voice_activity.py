"""Voice activity detection with quiet and loud backgrounds."""

from __future__ import annotations

from array import array
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from engine_plugin.speech.options import LiveOptions
from engine_plugin.speech.voice_activity import FRAME_BYTES, FRAME_SECONDS, VoiceActivityDetector, level
from tests.speech.sounds import mixed, noise, silence, speech, tone

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIONS = LiveOptions()
PAUSE = 35  # frames


def found(sound: bytes) -> list[tuple[float, float]]:
    """The spans of speech in seconds, including pauses below 0.7 s."""
    detector = VoiceActivityDetector(OPTIONS.speech_threshold, OPTIONS.quietest, 5)
    frames = [sound[at : at + FRAME_BYTES] for at in range(0, len(sound) - FRAME_BYTES + 1, FRAME_BYTES)]
    spoken = [place for place, frame in enumerate(frames) if detector.update(level(frame))]
    if not spoken:
        return []
    gaps = [(before, after) for before, after in pairwise(spoken) if after - before > PAUSE]
    begins = [spoken[0], *(after for _before, after in gaps)]
    ends = [*(before for before, _after in gaps), spoken[-1]]
    return [(begin * FRAME_SECONDS, end * FRAME_SECONDS) for begin, end in zip(begins, ends, strict=True)]


def scene(amplitude: float) -> bytes:
    return silence(2) + speech(3, amplitude) + silence(1.5) + speech(2, amplitude) + silence(2)


def assert_both(spans: list[tuple[float, float]]) -> None:
    assert len(spans) == 2, spans
    for (begin, end), (least, most) in zip(spans, [(2, 5), (6.5, 8.5)], strict=True):
        assert begin == pytest.approx(least, abs=0.15)
        assert end == pytest.approx(most, abs=0.25)


@pytest.mark.parametrize("amplitude", [0.8, 0.1, 0.02])
def test_speech_of_each_loudness_is_detected_in_silence(amplitude: float) -> None:
    assert_both(found(scene(amplitude)))


@pytest.mark.parametrize(
    "background",
    [
        partial(noise, 10.5, 0.001),
        partial(noise, 10.5, 0.01),
        partial(tone, 10.5, 50, 0.05),
        array("h", [3000] * 168_000).tobytes,
    ],
    ids=["hiss", "loud hiss", "hum", "offset"],
)
def test_speech_above_a_background_is_detected(background: Callable[[], bytes]) -> None:
    assert_both(found(mixed(scene(0.3), background())))


@pytest.mark.parametrize(
    "sound",
    [partial(silence, 10), partial(noise, 10, 0.0005), partial(noise, 10, 0.002), partial(tone, 10, 50, 0.02)],
    ids=["silence", "dither", "hiss", "hum"],
)
def test_sound_without_speech_is_not_detected(sound: Callable[[], bytes]) -> None:
    assert found(sound()) == []


@pytest.mark.parametrize("change", [partial(noise, 20, 0.05), partial(tone, 20, 1000, 0.2)], ids=["fan", "beep"])
def test_new_background_is_adopted(change: Callable[[], bytes]) -> None:
    spans = found(noise(4, 0.0005) + change())
    assert all(end < 6 for _begin, end in spans)


def test_speech_above_a_new_background_is_detected() -> None:
    sound = noise(4, 0.0005) + mixed(noise(10, 0.01), silence(4) + speech(4, 0.5))
    begin, end = found(sound)[-1]
    assert begin == pytest.approx(8, abs=0.15)
    assert end == pytest.approx(12, abs=0.25)


def test_speech_from_the_first_frame_is_detected() -> None:
    begin, end = found(speech(6) + silence(1))[0]
    assert begin < 0.2
    assert end == pytest.approx(6, abs=0.3)


def test_speech_without_pauses_does_not_become_background() -> None:
    (span,) = found(mixed(speech(30), noise(30, 0.001)))
    assert span == pytest.approx((0, 30), abs=0.3)


def test_click_is_not_speech() -> None:
    assert found(silence(2) + tone(0.02, 1000, 0.9) + silence(2) + tone(0.04, 1000, 0.9) + silence(2)) == []


def test_level_of_tones_and_offsets() -> None:
    assert level(bytes(FRAME_BYTES)) == -96
    assert level(array("h", [12_000] * 320).tobytes()) < -70, "an offset has no level"
    loud, quiet = (level(tone(0.02, 1000, amplitude)) for amplitude in (0.5, 0.05))
    assert loud - quiet == pytest.approx(20, abs=0.2)
    assert loud == pytest.approx(-10, abs=4)
    assert level(tone(0.02, 50, 0.5)) < loud - 12, "hum counts for less"
    assert level(array("h", [-32768, 32767] * 160).tobytes()) < loud
    assert level(array("h", [-32768] * 2 + [32767] * 2).tobytes() * 80) < 10
