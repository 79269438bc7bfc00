"""Log records as hclog JSON lines on stderr, from which a go-plugin host reads level and fields.

    {"@level": "info", "@message": "…", "@timestamp": "2026-01-02T03:04:05.678901Z", "@module": "…", …}

The host panics when one of the first three is not a string, drops an unknown level, and cuts lines at
64 KiB (go-plugin, client.go: logStderr; log_entry.go: parseJSON). Libraries' logging is sent too.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine_plugin.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LEVEL_VARIABLE", "HclogFormatter", "HclogHandler", "install_hclog"]

LEVEL_VARIABLE = "ENGINE_PLUGIN_LOG"
_LEVELS = {"trace": 5, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}

_LINE_LIMIT = 60_000  # bytes, newline included; the host's buffer holds 65,536
_BACKLOG_LIMIT = 4 << 20  # bytes kept for a host that does not read
_STANDARD_FIELDS = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
_OURS = ("@level", "@message", "@timestamp", "@module")
_CHATTY = ("httpx", "httpcore", "grpc")  # logs several lines for each request: trace only


class HclogFormatter(logging.Formatter):
    """Turns a record into one JSON line without its newline; `extra` fields become key-value pairs."""

    def format(self, record: logging.LogRecord) -> str:
        # The host parses the zone as Go writes it, with Z for UTC.
        timestamp = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        fields: dict[str, Any] = {
            "@level": _level_name(record.levelno),
            "@message": record.getMessage(),
            "@timestamp": timestamp,
            "@module": record.name,
        }
        for key, value in vars(record).items():
            if key not in _STANDARD_FIELDS:
                fields.setdefault(key, _plain(value))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return _fit({key: redacted(value) if isinstance(value, str) else value for key, value in fields.items()})


class HclogHandler(logging.Handler):
    """Writes hclog lines to a descriptor; what would block, from a thread of its own.

    A host that does not read blocks that thread and never the event loop; other threads wait for a lock only. Lines
    beyond a backlog of 4 MiB are dropped, counted and reported. Nothing raises.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.setFormatter(HclogFormatter())
        self._fd = fd
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._backlog = 0
        self._dropped = 0
        self._closed = False
        self._writer: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - whatever a foreign __str__ or a bad % raises, it must not spread
            where = f"{record.pathname}:{record.lineno}"
            broken = logging.makeLogRecord({"name": record.name, "levelno": record.levelno, "where": where})
            text = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
            broken.msg = f"{text} (cannot be shown with its arguments: {type(error).__name__})"
            line = self.format(broken)
        self.put(line.encode() + b"\n")

    def put(self, line: bytes) -> None:
        """Have a line written, or count it as dropped. Called from any thread."""
        with self._changed:
            if self._closed:
                return
            if self._backlog + len(line) > _BACKLOG_LIMIT:
                self._dropped += 1
                return
            if self._dropped:
                text = f"{self._dropped} log lines were dropped: the host had stopped reading stderr"
                notice = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "msg": text})
                line = self.format(notice).encode() + b"\n" + line
            if not self._backlog and _is_room(self._fd, len(line)):
                _write_all(self._fd, line)
            elif self._has_writer():
                self._lines.append(line)
                self._backlog += len(line)
                self._changed.notify_all()
            else:
                self._dropped += 1
                return
            self._dropped = 0

    def drain(self, timeout: float) -> None:
        """Wait until all lines are written, at most `timeout` seconds. Called before the process exits."""
        with self._changed:
            self._changed.wait_for(lambda: not self._backlog, timeout)

    def close(self) -> None:
        """Let the thread write its backlog and end, without waiting. Called by `logging` at exit."""
        with self._changed:
            if self._writer is None and not self._closed:
                os.close(self._fd)
            self._closed = True
            self._changed.notify_all()
        super().close()

    def _has_writer(self) -> bool:
        """Start the thread if need be. False if the system refuses it."""
        if self._writer is None:
            writer = threading.Thread(target=self._run, name="hclog", daemon=True)
            try:
                writer.start()
            except RuntimeError:
                return False
            self._writer = writer
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closed)
                if not self._lines:
                    break
                line = self._lines.popleft()
            _write_all(self._fd, line)
            with self._changed:
                self._backlog -= len(line)
                self._changed.notify_all()
        os.close(self._fd)


def install_hclog(environ: Mapping[str, str], fd: int = 2) -> HclogHandler:
    """Send all logging to `fd` at the level that ENGINE_PLUGIN_LOG names (default info). Called by `serve`."""
    wanted = environ.get(LEVEL_VARIABLE, "").strip().lower()
    wanted = {"warning": "warn", "critical": "error"}.get(wanted, wanted)
    level = _LEVELS.get(wanted, logging.INFO)
    handler = HclogHandler(os.dup(fd))  # a copy, not inheritable: stays valid whatever is done to fd 2
    logging.addLevelName(_LEVELS["trace"], "TRACE")
    logging.captureWarnings(True)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > _LEVELS["trace"] else level)
    if wanted and wanted not in _LEVELS:
        logging.getLogger(__name__).warning(
            "%s is %r. Set it to one of %s.", LEVEL_VARIABLE, wanted, ", ".join(_LEVELS)
        )
    return handler


def _is_room(fd: int, size: int) -> bool:
    """Whether so many bytes can be written without waiting."""
    if sys.platform == "win32" or size > select.PIPE_BUF:
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _write_all(fd: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:  # the host has died; the watchdog ends the plugin
        return


def _level_name(levelno: int) -> str:
    return max((name for name in _LEVELS if _LEVELS[name] <= levelno), key=_LEVELS.__getitem__, default="trace")


def _plain(value: object) -> Any:
    """A value that Go's JSON reader accepts: no NaN, no number that a float64 cannot hold exactly."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and -(2**53) < value < 2**53:  # which NaN is not
        return value
    return str(value)


def _fit(fields: dict[str, Any]) -> str:
    """JSON below the line limit: long strings lose their middle, then extra fields are dropped."""
    limit = _LINE_LIMIT
    shown = fields
    while len(line := json.dumps(shown, ensure_ascii=False).encode(errors="replace")) >= _LINE_LIMIT:
        limit //= 2
        kept = fields if limit >= 64 else {key: fields[key] for key in _OURS}
        shown = {key: _cut(value, limit) for key, value in kept.items()}
    return line.decode()


def _cut(value: Any, limit: int) -> Any:
    if not isinstance(value, str) or len(value) <= limit:
        return value
    half = limit // 2
    return f"{value[:half]} …[{len(value) - 2 * half} characters cut]… {value[len(value) - half :]}"
