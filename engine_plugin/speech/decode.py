"""Turns audio of any common format into 16 kHz mono s16le. Runs as a process of its own.

`python -m engine_plugin.speech.decode`: the media libraries that read what strangers send run here and not
in the plugin, with the memory that they may take bounded. It imports the stdlib, the guard and its like, and PyAV.

stdin: one line of JSON, {"live": bool, "format": ffmpeg's name or "", "rate", "channels": of raw samples, "longest":
seconds}, then the audio until the end of stdin. A file is read wholly first, since some formats have their table of
contents at the end; a live stream is decoded as it arrives.

stdout: frames of one letter, a 4-byte big-endian length and so many bytes: "a" audio, and at last one of "d" (done;
`CUT_OFF` where the recording's end is missing), "e" (the audio is at fault: a sentence for its sender) and "m" (a
package is missing: its name).
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from engine_plugin.process import guard
from engine_plugin.process.entry import own_stdin
from engine_plugin.speech.containers import HEAD, UNKNOWN_LENGTH, container_of, is_cut_off

if TYPE_CHECKING:
    from collections.abc import Iterator

    import av
    from av.audio.frame import AudioFrame
    from av.container import InputContainer

__all__ = ["CUT_OFF", "RATE", "SPARE", "main", "too_long"]

RATE = 16_000
_WIDTH = 2
_BATCH = 64 * 1024  # bytes in a frame of a file's audio
_LIVE_BATCH = 640  # of a live stream's: 20 ms
_MEMORY = 1 << 30
_LIVE_MEMORY = 256 << 20
_MAY_LACK = 0.25  # seconds by which a whole file may be shorter than it says
_EXACT = 0.02  # where the file counts its samples; what resampling rounds away

CUT_OFF = b"cut off"

SPARE = 1.0
"""Seconds by which a recording may be longer than `longest`: encoders pad."""

# What may be opened, by ffmpeg's names. Playlists, and whatever else names other files, stay out.
_FORMATS = "wav,w64,mp3,flac,ogg,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,aac,aiff,au,amr,caf,s16le"
_CODECS = (
    "pcm_s16le,pcm_s16be,pcm_s8,pcm_u8,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be,"
    "pcm_alaw,pcm_mulaw,adpcm_ms,adpcm_ima_wav,adpcm_ima_qt,mp3float,mp3,mp2,mp2float,mp1,mp1float,flac,vorbis,libvorbis,"
    "opus,libopus,aac,aac_latm,alac,amrnb,amrwb,amr_nb,amr_wb"
)
_NO_FORMAT = "is in no format that is read here (WAV, MP3, FLAC, OGG, WebM, M4A), or damaged"

_UNSTREAMED = "is an M4A file that is cut off, or cannot be streamed since its table of contents is at the end"


class _BadAudioError(Exception):
    """The text is for whoever sent the audio."""


class _Incoming:
    """stdin as a live stream: what has arrived is read at once, and nothing can be sought."""

    def __init__(self, stdin: io.BufferedReader) -> None:
        self._stdin = stdin
        self.empty = True

    def read(self, size: int) -> bytes:
        data = self._stdin.read1(size)
        self.empty = self.empty and not data
        return data


class _Outgoing:
    """Frames on the pipe that was stdout."""

    def __init__(self, descriptor: int, batch: int) -> None:
        self._descriptor = descriptor
        self._batch = batch
        self._waiting = bytearray()
        self.samples = 0

    def audio(self, data: bytes) -> None:
        self.samples += len(data) // _WIDTH
        self._waiting += data
        if len(self._waiting) >= self._batch:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self.frame(b"a", bytes(self._waiting))
            self._waiting.clear()

    def frame(self, kind: bytes, payload: bytes = b"") -> None:
        rest = memoryview(kind + len(payload).to_bytes(4, "big") + payload)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def main() -> int:
    """Decode stdin and return the exit status: 0 whenever a last frame was written."""
    guard.arm()
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no frame
    stdin = open(own_stdin(), "rb")  # noqa: SIM115, PTH123  # until the process ends
    settings = json.loads(stdin.readline())
    frames = _Outgoing(out, _LIVE_BATCH if settings["live"] else _BATCH)
    _bound_memory(_LIVE_MEMORY if settings["live"] else _MEMORY)
    try:
        import av  # noqa: F401
    except ImportError as error:
        frames.frame(b"m", (error.name or "av").encode())
        return 0
    try:
        cut_off = _decode(settings, stdin, frames)
        frames.flush()
    except _BadAudioError as error:
        frames.flush()
        frames.frame(b"e", str(error).encode())
    except MemoryError:
        frames.frame(b"e", b"takes too much memory to be decoded")
    else:
        frames.frame(b"d", CUT_OFF if cut_off else b"")
    return 0


def _bound_memory(most: int) -> None:
    """A header may ask for any amount of it."""
    if sys.platform == "linux":
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _decode(settings: dict[str, Any], stdin: io.BufferedReader, out: _Outgoing) -> bool:
    """Write all of the audio to `out`; whether a recording's end is missing. Raises _BadAudioError."""
    import av

    live = settings["live"]
    source: Any = _Incoming(stdin) if live else io.BytesIO(stdin.read())
    options = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": ""}
    if live:
        options |= {"probesize": "32768", "analyzeduration": "100000"}
    if settings["format"] == "s16le":
        options |= {"sample_rate": str(settings["rate"]), "ch_layout": f"{settings['channels']}c"}
    try:
        container = av.open(source, "r", format=settings["format"] or None, options=options)
    except av.FFmpegError as error:
        if live and source.empty:
            return False  # a stream of nothing is a stream that said nothing
        raise _BadAudioError(_reason(error, source)) from None
    with container:
        is_short = _decode_container(container, settings, out)
    return not live and (is_short or is_cut_off(source.getvalue()))


def _reason(error: av.FFmpegError, source: Any) -> str:
    """Why ffmpeg could not open it."""
    if isinstance(source, io.BytesIO):
        data = source.getvalue()
        if not data:
            return "is empty"
        if container_of(data[:HEAD]) == "m4a" and is_cut_off(data):
            return "is an M4A file that is cut off before its table of contents, without which nothing can be decoded"
    if "moov" in str(error).lower():
        return _UNSTREAMED
    return _NO_FORMAT


def _decode_container(container: InputContainer, settings: dict[str, Any], out: _Outgoing) -> bool:
    """Resample every frame of the first audio stream; whether there is less than it says. Raises _BadAudioError."""
    import av

    if not container.streams.audio:
        raise _BadAudioError("holds no audio, only video" if container.streams.video else "holds no audio")
    _check_codec(container.streams.audio[0].codec_context)
    said = _said_length(container)
    longest = settings["longest"]
    if not settings["live"] and said > longest + SPARE:
        raise _BadAudioError(too_long(longest))
    mixer: av.AudioResampler | None = None
    shape: tuple[object, ...] = ()
    for frame in _frames(container):
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        if mixer is None or now != shape:  # one file may hold several streams, one behind the other
            _drain(mixer, out)
            mixer, shape = av.AudioResampler(format="s16", layout="mono", rate=RATE), now
        for done in mixer.resample(frame):
            _give(done, out)
        if longest and out.samples > (longest + SPARE) * RATE:
            raise _BadAudioError(too_long(longest))
    _drain(mixer, out)
    if not out.samples and not settings["live"]:
        raise _BadAudioError("holds no sound: its length is zero")
    return out.samples / RATE < said - (_EXACT if container.format.name == "flac" else _MAY_LACK)


def _check_codec(context: Any) -> None:
    """ffmpeg's own whitelist counts while a file is opened, not for what is decoded then."""
    codec = context.codec.name if context is not None else "unknown"
    if codec not in _CODECS.split(","):
        raise _BadAudioError(f"has an unsupported codec ({codec}). Send WAV, MP3, FLAC, Opus or AAC")


def too_long(longest: float) -> str:
    """What is said of a recording of more seconds than are taken."""
    return f"is longer than {longest:g} s, the longest that is taken; send it in parts"


def _frames(container: InputContainer) -> Iterator[AudioFrame]:
    """Every frame that can be decoded; damage is passed over as players do, unless there is more of it than sound."""
    import av

    stream = container.streams.audio[0]
    stream.codec_context.thread_count = 1
    bad = good = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            decoded = packet.decode()
        except av.FFmpegError:
            bad += 1
            if bad > 10 + good:
                break
            continue
        good += len(decoded)
        yield from decoded
    if bad > good:
        streamed = "mov" in container.format.name and not good
        raise _BadAudioError(_UNSTREAMED if streamed else "is damaged: more of it is lost than can be decoded")


def _said_length(container: InputContainer) -> float:
    """How many seconds of audio the file claims to have; 0 where that is unknown, or is only an estimate."""
    stream = container.streams.audio[0]
    if container.format.name in ("mp3", "aac", "amr") or stream.duration is None or stream.time_base is None:
        return 0.0
    seconds = float(stream.duration * stream.time_base)
    context = stream.codec_context
    size = seconds * (context.rate or 0) * context.channels * max(1, context.format.bytes if context.format else 1)
    return 0.0 if container.format.name == "wav" and size >= UNKNOWN_LENGTH else seconds


def _drain(mixer: av.AudioResampler | None, out: _Outgoing) -> None:
    if mixer is not None:
        for done in mixer.resample(None):
            _give(done, out)


def _give(frame: AudioFrame, out: _Outgoing) -> None:
    out.audio(bytes(frame.planes[0])[: frame.samples * _WIDTH])  # a plane may end with padding


if __name__ == "__main__":
    try:
        code = main()
    except (BrokenPipeError, KeyboardInterrupt):
        code = 1  # nobody listens any more
    os._exit(code)
