"""Detects the container of a recording and whether the recording is truncated, from its bytes.

Nothing is decoded. The module imports only the standard library, because the decoder program imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HEAD", "UNKNOWN_LENGTH", "container_of", "is_cut_off", "wav_chunks"]

HEAD = 16
"""How many bytes from the beginning `container_of` needs."""

UNKNOWN_LENGTH = 0x7FFFF000
"""A WAV that was written to a pipe declares this length or more, in bytes, or 0."""

_MAGICS = (
    (0, b"OggS", "ogg"),
    (0, b"fLaC", "flac"),
    (0, b"ID3", "mp3"),
    (0, b"\x1aE\xdf\xa3", "webm"),
    (0, b"FORM", "aiff"),
    (0, b"caff", "caf"),
    (0, b".snd", "au"),
    (0, b"#!AMR", "amr"),
    (0, b"riff\x2e\x91\xcf\x11", "w64"),
    *((4, box, "m4a") for box in (b"ftyp", b"styp", b"moof", b"moov", b"sidx", b"mdat", b"free", b"skip", b"wide")),
)
_WAVES = (b"RIFF", b"RF64", b"BW64")


def container_of(head: bytes, *, by_frames: bool = True) -> str:
    """The container that begins with `head`: one of `decoder.FORMATS`, or "" if unknown.

    `by_frames`: also detect MPEG audio without a header. Raw samples can be mistaken for its 16-bit sync word.
    """
    if head[:4] in _WAVES and head[8:12] == b"WAVE":
        return "wav"
    for place, magic, name in _MAGICS:
        if head.startswith(magic, place):
            return name
    if not by_frames:
        return ""
    return "aac" if _adts_frame(head, 0) else "mp3" if _mpeg_frame(head, 0) else ""


def is_cut_off(audio: bytes) -> bool:
    """Whether a recording is shorter than its headers declare. Takes up to a second for an hour of MP3."""
    check = _CHECKS.get(container_of(audio[:HEAD]))
    try:
        return check is not None and check(audio)
    except (IndexError, ValueError):
        return True


def wav_chunks(audio: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name, the position and the declared size of each chunk of a WAV."""
    place = 12
    while place + 8 <= len(audio):
        size = _number(audio, place + 4, 4, "little")
        yield audio[place : place + 4], place + 8, size
        place += 8 + size + size % 2


def _number(audio: bytes, place: int, size: int = 4, order: Literal["big", "little"] = "big") -> int:
    if place + size > len(audio):
        raise IndexError
    return int.from_bytes(audio[place : place + size], order)


def _wav(audio: bytes) -> bool:
    long_size = 0
    for name, place, size in wav_chunks(audio):
        if name == b"ds64":
            long_size = _number(audio, place + 8, 8, "little")
        if name == b"data":
            return place + (long_size or (size if size < UNKNOWN_LENGTH else 0)) > len(audio)
    return True


def _ogg(audio: bytes) -> bool:
    last = audio.rfind(b"OggS")
    laces = audio[last + 26]
    end = last + 27 + laces + sum(audio[last + 27 : last + 27 + laces])
    return end > len(audio) or not audio[last + 5] & 4  # end-of-stream flag


def _m4a(audio: bytes) -> bool:
    place = 0
    while place < len(audio):
        size = _number(audio, place)
        if size == 1:
            size = _number(audio, place + 8, 8)
        if size == 0:  # to the end
            return False
        place += max(8, size)
    return place > len(audio)


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675


def _webm(audio: bytes) -> bool:
    """Live recorders leave the sizes of segments and clusters open; their elements are then checked."""
    place = 0
    while place < len(audio):
        name, place = _ebml(audio, place, keep_mark=True)
        start = place
        size, place = _ebml(audio, place, keep_mark=False)
        is_open = size == (1 << 7 * (place - start)) - 1
        if is_open or (name in (_SEGMENT, _CLUSTER) and place + size <= len(audio)):
            continue
        place += size
    return place > len(audio)


def _ebml(audio: bytes, place: int, *, keep_mark: bool) -> tuple[int, int]:
    """Read a variable-length integer; return it and the position after it."""
    first = audio[place]
    length = 9 - first.bit_length()
    value = _number(audio, place, length)
    return (value if keep_mark else value & ((1 << 7 * length) - 1)), place + length


def _aiff(audio: bytes) -> bool:
    return 8 + _number(audio, 4) > len(audio)


def _caf(audio: bytes) -> bool:
    place = 8
    while place < len(audio):
        name, size = audio[place : place + 4], _number(audio, place + 4, 8)
        if name == b"data" and size == (1 << 64) - 1:
            return False
        place += 12 + size
    return place > len(audio)


def _au(audio: bytes) -> bool:
    start, size = _number(audio, 4), _number(audio, 8)
    return size != 0xFFFFFFFF and start + size > len(audio)


_AMR_NARROW = (12, 13, 15, 17, 19, 20, 26, 31, 5, 0, 0, 0, 0, 0, 0, 0)
_AMR_WIDE = (17, 23, 32, 36, 40, 46, 50, 58, 60, 5, 0, 0, 0, 0, 0, 0)


def _amr(audio: bytes) -> bool:
    sizes, place = (_AMR_WIDE, 9) if audio.startswith(b"#!AMR-WB\n") else (_AMR_NARROW, 6)
    while place < len(audio):
        place += 1 + sizes[audio[place] >> 3 & 15]
    return place > len(audio)


_BIT_RATES = {  # kbit/s, by version 1 or not, and layer
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)


def _mpeg_frame(audio: bytes, place: int) -> int:
    """The size of the MPEG audio frame at `place`; 0 if there is none."""
    if place + 3 > len(audio) or audio[place] != 0xFF or audio[place + 1] & 0xE0 != 0xE0:
        return 0
    version, layer = audio[place + 1] >> 3 & 3, 4 - (audio[place + 1] >> 1 & 3)
    bit_rate, rate, padding = audio[place + 2] >> 4, audio[place + 2] >> 2 & 3, audio[place + 2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return 0
    kilobits = _BIT_RATES[version == 3, layer][bit_rate]
    hertz = _RATES[rate] // (1 if version == 3 else 2 if version == 2 else 4)
    if layer == 1:
        return (12_000 * kilobits // hertz + padding) * 4
    return (72_000 if layer == 3 and version != 3 else 144_000) * kilobits // hertz + padding


def _adts_frame(audio: bytes, place: int) -> int:
    """The size of the ADTS frame at `place`; 0 if there is none."""
    if place + 7 > len(audio) or audio[place] != 0xFF or audio[place + 1] & 0xF6 != 0xF0:
        return 0
    size = (audio[place + 3] & 3) << 11 | audio[place + 4] << 3 | audio[place + 5] >> 5
    return size if audio[place + 2] >> 2 & 15 < 13 and size > 7 else 0


def _frames(audio: bytes, place: int, size_at: Callable[[bytes, int], int]) -> Iterator[int]:
    """Yield the end of each frame; bytes between frames are skipped."""
    while place < len(audio):
        size = size_at(audio, place)
        if size:
            place += size
            yield place
        else:
            place = audio.find(b"\xff", place + 1)
            if place < 0:
                return


def _mp3(audio: bytes) -> bool:
    place = 0
    if audio.startswith(b"ID3"):
        size = 0
        for part in audio[6:10]:
            size = size << 7 | part & 127
        place = 10 + size
    tags = audio.rfind(b"TAG", len(audio) - 128)
    sound = audio[:tags] if tags >= 0 else audio
    ends = list(_frames(sound, place, _mpeg_frame))
    if not ends:
        return False
    first = sound[place : ends[0]]
    mark = max(first.find(b"Xing"), first.find(b"Info"))
    counted = mark >= 0 and _number(first, mark + 4) & 1
    return ends[-1] > len(sound) or bool(counted and len(ends) - 1 < _number(first, mark + 8))


def _aac(audio: bytes) -> bool:
    end = 0
    for end in _frames(audio, 0, _adts_frame):  # noqa: B007  # the last one counts
        pass
    return end > len(audio)


_CHECKS: dict[str, Callable[[bytes], bool]] = {
    "wav": _wav,
    "ogg": _ogg,
    "m4a": _m4a,
    "webm": _webm,
    "aiff": _aiff,
    "caf": _caf,
    "au": _au,
    "amr": _amr,
    "mp3": _mp3,
    "aac": _aac,
}
