"""Detection of containers and of truncated recordings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.speech.containers import HEAD, container_of, is_cut_off
from engine_plugin.speech.decoder import FORMATS
from tests.speech.sounds import encoded, noise, speech, tone, wav

pytest.importorskip("av")

FORMS: dict[str, tuple[str, str, str, int, dict[str, str]]] = {
    "wav": ("wav", "wav", "pcm_s16le", 44_100, {}),
    "rf64": ("wav", "wav", "pcm_s16le", 44_100, {"rf64": "always"}),
    "mp3": ("mp3", "mp3", "libmp3lame", 44_100, {}),
    "mp3 without a tag": ("mp3", "mp3", "libmp3lame", 44_100, {"id3v2_version": "0"}),
    "bare mp3": ("mp3", "mp3", "libmp3lame", 22_050, {"id3v2_version": "0", "write_xing": "0"}),
    "mp3 with both tags": ("mp3", "mp3", "libmp3lame", 8_000, {"write_id3v1": "1"}),
    "adts": ("aac", "adts", "aac", 44_100, {}),
    "flac": ("flac", "flac", "flac", 44_100, {}),
    "ogg": ("ogg", "ogg", "libopus", 48_000, {}),
    "webm": ("webm", "webm", "libopus", 48_000, {}),
    "live webm": ("webm", "webm", "libopus", 48_000, {"live": "1"}),
    "matroska": ("webm", "matroska", "aac", 44_100, {}),
    "m4a": ("m4a", "ipod", "aac", 44_100, {}),
    "fragmented mp4": ("m4a", "mp4", "aac", 44_100, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "aiff": ("aiff", "aiff", "pcm_s16be", 44_100, {}),
    "caf": ("caf", "caf", "pcm_s16be", 44_100, {}),
    "au": ("au", "au", "pcm_s16be", 8_000, {}),
    "w64": ("w64", "w64", "pcm_s16le", 8_000, {}),
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """One second of a tone in each container."""
    return {
        name: encoded(form, codec, tone(1, rate=rate), rate=rate, options=options)
        for name, (_found, form, codec, rate, options) in FORMS.items()
    }


@pytest.mark.promise("S9")
@pytest.mark.parametrize("name", FORMS)
def test_container_is_detected_from_its_first_bytes(files: dict[str, bytes], name: str) -> None:
    assert container_of(files[name][:HEAD]) == FORMS[name][0]


@pytest.mark.promise("S9")
@pytest.mark.parametrize("box", [b"ftypiso5", b"stypmsdh", b"moof\0\0\0\x10mfhd", b"moov\0\0\0\x6c", b"sidx\0\0\0\0"])
def test_mp4_is_detected_by_any_first_box(box: bytes) -> None:
    assert container_of(b"\0\0\0\x18" + box + bytes(8)) == "m4a"


@pytest.mark.promise("S9")
def test_raw_samples_match_no_container() -> None:
    for samples in (speech(1), noise(1, 0.3), tone(1), bytes(100), b"", b"RI"):
        assert container_of(samples[:HEAD]) == ""
    assert container_of(b"\xff\xfb\x90\x64" + bytes(12)) == "mp3"
    assert container_of(b"\xff\xfb\x90\x64" + bytes(12), by_frames=False) == ""


@pytest.mark.promise("S13")
@pytest.mark.parametrize("name", sorted(FORMS.keys() - {"flac", "w64"}))
def test_truncated_recording_is_detected(files: dict[str, bytes], name: str) -> None:
    """At any cut except between two frames, where no header counts them."""
    data = files[name]
    assert not is_cut_off(data)
    chance = random.Random(1)  # noqa: S311  # the same cuts each time
    if name not in ("bare mp3", "adts", "live webm", "fragmented mp4"):
        assert all(is_cut_off(data[: chance.randrange(64, len(data) - 1)]) for _ in range(20))
    assert is_cut_off(data[:-3])


@pytest.mark.promise("S13")
def test_wav_of_unknown_length_is_complete() -> None:
    for size in (0, 0x7FFFF000, 0xFFFFFFFF):
        plain = bytearray(wav(speech(0.1)))
        plain[40:44] = size.to_bytes(4, "little")
        assert not is_cut_off(bytes(plain))


def test_damaged_file_raises_no_error(files: dict[str, bytes]) -> None:
    chance = random.Random(1)  # noqa: S311  # the same damage each time
    for data in files.values():
        for _ in range(20):
            broken = bytearray(data)
            for _ in range(chance.randrange(1, 20)):
                broken[chance.randrange(min(len(data), 2000))] = chance.randrange(256)
            assert is_cut_off(bytes(broken)) in (True, False)


@given(st.binary(max_size=40))
def test_arbitrary_bytes_raise_no_error(data: bytes) -> None:
    assert container_of(data) in {"", *FORMATS}
    assert is_cut_off(data) in (True, False)
