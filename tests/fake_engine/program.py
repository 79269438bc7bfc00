"""A llama-server that does what a script says, over real sockets. Stdlib only; `tests.fake_engine` makes it runnable.

It takes llama-server's arguments, listens where they say, loads (503 Loading model), and then answers /health,
/v1/models, /slots, /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/rerank in llama.cpp's shapes, with
the key of --api-key-file. It never looks at stdin, as llama-server does not. SIGTERM ends it with 0.

The script is a JSON file: {"*": [life, life, …], "tiny-chat": [life, …]}. The first process for a model gets the
first life of its list, the next one the second; the last life serves all further ones. A changed script is taken up
with the next request (its rules, at once). A life is an object with any of these keys:

before it listens
  say: [TEXT…]             lines on stderr
  allocate_mib: N          so much memory, touched
  grandchild: "same"|"own" a child that ignores SIGTERM and holds our pipes; in our session or one of its own
  ignore_term: true        SIGTERM is only written to the journal
  bind_until: PATH         wait for this file before binding (so that a test may take the port meanwhile)
  bind_last: true          load first, listen then
loading
  load_seconds: S, load_until: PATH   how long; by default not at all
  load_lines: S            a line of progress on stderr every S seconds; load_burns: true computes in silence
  load_exit: {CODE…}       end at the end of loading: see `die` below
  never_ready: true        /health says 503 for ever
  log_requests: true       a line on stderr for every request, /health too
answering
  tokens: N, interval: S   how long a stream is if the request has no max_tokens (-1: endless), and the pause between
                           tokens (0: as fast as the reader takes them)
  rules: [RULE…]           what is done in place of, or before, the proper answer to some requests

A rule is {"on": SERVICE, "from": N, "count": M, "do": WHAT, …}: it is for the Nth request of the service in this life
and M - 1 further ones (1 and all, if not given); the first rule that matches is taken. SERVICE is health, chat,
generate, embed, rerank, probe (the driver's first real request, whose text is "a"), other, or any (all but health).
  status    status, message: llama.cpp's error answer
  answer    body: any JSON, status 200
  hold      after: tokens already sent; until: PATH. Then goes on
  hang      after: tokens already sent (none: not even the head); then nothing, for ever
  head      the head of the answer and nothing else
  deaf      closes the reading side of the connection and never answers
  close, reset   end the connection without an answer; close_writing ends our side only
  garbage   bytes that are no HTTP; then close, or with open: true nothing more; with endless: true they never end
  truncated where: "head"|"body"|"chunk"; then the connection ends
  length    by: N, the content-length is wrong by so much
  event     after: tokens already sent; data: JSON of one event, then the stream ends (error events)
  cut       after: tokens; the stream ends in order but without data: [DONE]
  die       after: tokens (none: before the answer); code: N or signal: "SIGSEGV"; lines: [TEXT…] on stderr; with
            hangup: true it closes the connection a moment before
  block     nothing at all is answered, for seconds: S or until: PATH; burn: true computes meanwhile, silent otherwise
  stop      SIGSTOP for the whole process, then goes on if it is continued
  say       text: a line on stderr; then goes on
  flood     fd, mib, solid: true (one line that does not end); then goes on

The journal (JSON lines; each has event, model, life, pid) says: started (argv), bind_refused, listening, loaded,
request (service, number, of which path), refused (a wrong key), begun (the head of a stream is sent), answered,
client_gone (sent: tokens), grandchild (child), sigterm, blocked, exiting (code).

No such process outlives its two minutes, whatever a test does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, cast

__all__ = ["main"]

LIFETIME = 1000
VALUES = (
    "--model", "--alias", "--api-key-file", "--host", "--port", "--ctx-size", "--parallel", "--threads-http",
    "--cache-ram", "--batch-size", "--ubatch-size", "--threads", "--n-gpu-layers", "--pooling",
)  # fmt: skip
SWITCHES = (
    "--no-webui", "--offline", "--kv-unified", "--slots", "--jinja", "--no-prefill-assistant", "--embedding",
)  # fmt: skip
SERVICES = {
    "/health": "health",
    "/v1/chat/completions": "chat",
    "/v1/completions": "generate",
    "/v1/embeddings": "embed",
    "/v1/rerank": "rerank",
}
TOKENS = 8
_PAUSE = 0.003


def parse(argv: list[str]) -> dict[str, str]:
    """The arguments; unknown ones are refused, as llama-server does."""
    options: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if word in VALUES:
            options[word] = next(words)
        elif word in SWITCHES:
            options[word] = ""
        else:
            sys.stderr.write(f"error: invalid argument: {word}\n")
            raise SystemExit(1)
    return options


def say(text: str) -> None:
    """A line on stderr; blocks while a full pipe is not read."""
    os.write(2, text.encode() + b"\n")


def flood(fd: int, mib: int, *, solid: bool) -> None:
    block = b"x" * 65536 if solid else (b"y" * 63 + b"\n") * 1024
    for _ in range(mib * 16):
        left = memoryview(block)
        while left:
            left = left[os.write(fd, left) :]


def outlive(pid: int) -> None:
    """Kill a process that SIGSTOP keeps from its own alarm. Runs in a process without the mark of this test."""
    end = time.monotonic() + LIFETIME
    while time.monotonic() < end:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            time.sleep(0.2)
            continue
        return
    os.kill(pid, signal.SIGKILL)


def linger(token: str) -> None:
    """The grandchild."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(int(token), b"r")
    os.close(int(token))
    time.sleep(LIFETIME)


class Story:
    """The script, this life's place in it, and the journal."""

    def __init__(self, script: Path, model: str) -> None:
        self._script = script
        self._journal = script.with_suffix(".journal")
        self._model = model
        self._seen: tuple[int, int] | None = None
        self.life = self._count()
        self.plan: dict[str, Any] = {}
        self.refresh()

    def _count(self) -> int:
        number = 1
        while True:
            try:
                self._script.with_suffix(f".{self._model}.{number}").touch(exist_ok=False)
            except FileExistsError:
                number += 1
            else:
                return number

    def refresh(self) -> None:
        """Take up a script that has changed."""
        try:
            status = self._script.stat()
        except FileNotFoundError:
            return  # also: the test is over
        if self._seen != (status.st_mtime_ns, status.st_size):
            self._seen = (status.st_mtime_ns, status.st_size)
            shape = json.loads(self._script.read_text())
            lives = shape.get(self._model) or shape.get("*") or [{}]
            self.plan = lives[min(self.life, len(lives)) - 1]

    def tell(self, event: str, **facts: Any) -> None:
        line = {"event": event, "model": self._model, "life": self.life, "pid": os.getpid(), **facts}
        with contextlib.suppress(FileNotFoundError):  # the test is over
            fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(fd, json.dumps(line).encode() + b"\n")
            os.close(fd)


class FakeServer:
    """One life."""

    def __init__(self, options: dict[str, str], story: Story) -> None:
        self.options = options
        self.story = story
        self.key = Path(options["--api-key-file"]).read_text().strip() if options.get("--api-key-file") else ""
        self.loaded = False
        self.busy: set[object] = set()
        self._counts: dict[str, int] = {}
        self._ballast = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    async def run(self) -> NoReturn:
        plan = self.story.plan
        self._catch_sigterm()
        self.story.tell("started", argv=sys.argv[1:])
        for line in plan.get("say", ()):
            say(line)
        if plan.get("allocate_mib"):
            self._ballast = bytearray(b"\1") * (plan["allocate_mib"] << 20)
        if plan.get("grandchild"):
            self._spawn_grandchild(alone=plan["grandchild"] == "own")
        if plan.get("bind_until"):
            await self.until(plan["bind_until"])
        if plan.get("bind_last"):
            await self._load()
            await self._listen()
        else:
            await self._listen()
            await self._load()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("unreachable")

    def _catch_sigterm(self) -> None:
        def handle(_number: int, _frame: object) -> None:
            self.story.tell("sigterm")
            if not self.story.plan.get("ignore_term"):
                self.exit(0)

        # The loop's own handler does nothing but wake the loop, lest the signal be slept through.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
        signal.signal(signal.SIGTERM, handle)

    def _spawn_grandchild(self, *, alone: bool) -> None:
        receive, send = os.pipe()
        argv = [sys.executable, "-I", "-S", __file__, "--linger", str(send)]
        child = subprocess.Popen(argv, pass_fds=[send], start_new_session=alone)
        os.close(send)
        os.read(receive, 1)
        os.close(receive)
        child.returncode = 0  # it is meant to outlive the object
        self.story.tell("grandchild", child=child.pid)

    async def _listen(self) -> None:
        host, port = self.options["--host"], int(self.options.get("--port", "8080"))
        loop = asyncio.get_running_loop()
        try:
            if host.endswith(".sock"):
                await loop.create_unix_server(lambda: Connection(self), host, backlog=1024)
            else:
                await loop.create_server(lambda: Connection(self), host, port, backlog=1024)
        except OSError:
            say(f"0.00.010.000 E srv  start: couldn't bind HTTP server socket, hostname: {host}, port: {port}")
            say("0.00.010.001 E srv  llama_server: exiting due to HTTP server error")
            self.story.tell("bind_refused", host=host, port=port)
            self.exit(1)
        self.story.tell("listening", host=host, port=port)

    async def _load(self) -> None:
        plan = self.story.plan
        stopped = threading.Event()
        if plan.get("load_burns"):
            threading.Thread(target=burn_until, args=(stopped,), daemon=True).start()
        progress = asyncio.create_task(self._progress(plan["load_lines"])) if plan.get("load_lines") else None
        try:
            await asyncio.sleep(plan.get("load_seconds", 0))
            if plan.get("load_until"):
                await self.until(plan["load_until"])
        finally:
            stopped.set()
            if progress is not None:
                progress.cancel()
        if plan.get("load_exit"):
            self.die(plan["load_exit"])
        if not plan.get("never_ready"):
            self.loaded = True
            self.story.tell("loaded")

    async def _progress(self, interval: float) -> None:
        step = 0
        while True:
            step += 1
            say(f"0.00.{step:03}.000 I load_tensors: step {step}")
            await asyncio.sleep(interval)

    async def until(self, path: str) -> None:
        while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240, PTH110  # a file cannot be awaited, and this is quick
            await asyncio.sleep(_PAUSE)

    def exit(self, code: int) -> NoReturn:
        self.story.tell("exiting", code=code)
        os._exit(code)

    def die(self, how: dict[str, Any]) -> NoReturn:
        for line in how.get("lines", ()):
            say(line)
        if not how.get("signal"):
            self.exit(how.get("code", 1))
        self.story.tell("exiting", code=how["signal"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), getattr(signal, how["signal"]))
        time.sleep(LIFETIME)
        os._exit(99)

    def block(self, rule: dict[str, Any]) -> None:
        """Do nothing else: the event loop stands still."""
        self.story.tell("blocked")
        end = time.monotonic() + rule.get("seconds", LIFETIME)
        path = Path(rule["until"]) if rule.get("until") else None
        while time.monotonic() < end and (path is None or not path.exists()):
            if rule.get("burn"):
                sum(range(20_000))
            else:
                time.sleep(_PAUSE if path else LIFETIME)  # looking for a file would be use of the processor

    def stop_the_world(self) -> None:
        argv = [sys.executable, "-I", "-S", __file__, "--outlive", str(os.getpid())]
        quiet = subprocess.DEVNULL
        guard = subprocess.Popen(argv, start_new_session=True, env={}, stdin=quiet, stdout=quiet, stderr=quiet)
        guard.returncode = 0
        self.story.tell("stopping")
        os.kill(os.getpid(), signal.SIGSTOP)

    # Requests

    def rule_for(self, service: str) -> dict[str, Any]:
        """Count the request, and say what shall be done with it."""
        self.story.refresh()
        names = (service,) if service == "health" else (service, "any")
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + 1
        for rule in self.story.plan.get("rules", ()):
            if rule["on"] in names:
                late = self._counts[rule["on"]] - rule.get("from", 1)
                if 0 <= late < rule.get("count", 1 << 60):
                    return cast("dict[str, Any]", rule)
        return {"do": "nothing"}

    def number(self, service: str) -> int:
        return self._counts[service]

    def spawn(self, connection: Connection) -> asyncio.Task[None]:
        task = asyncio.create_task(connection.work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def burn_until(stopped: threading.Event) -> None:
    while not stopped.is_set():
        sum(range(20_000))


class Connection(asyncio.Protocol):
    """One client's connection: its requests one after the other."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.transport: asyncio.Transport
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._deaf = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._service = ""
        self._sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._task is None and self._whole():
            self._task = self.server.spawn(self)

    def eof_received(self) -> bool:
        return self._deaf

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None and not self._task.done():
            self.server.story.tell("client_gone", service=self._service, sent=self._sent)
            self._task.cancel()
        self.server.busy.discard(self)

    def _whole(self) -> tuple[str, dict[str, str], bytes] | None:
        """The next request, if all of it is here: method and path, headers, body. Stays in the buffer."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", "0"))
        if len(self._buffer) < end + 4 + size:
            return None
        return first, headers, bytes(self._buffer[end + 4 : end + 4 + size])

    async def work(self) -> None:
        while (request := self._whole()) is not None:
            first, headers, body = request
            del self._buffer[: self._buffer.find(b"\r\n\r\n") + 4 + len(body)]
            self._sent = 0
            try:
                await self._answer(first.split(" ")[1], headers, body)
            finally:
                self.server.busy.discard(self)
            if self.transport.is_closing():
                return
        self._task = None

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> None:
        server = self.server
        asked: dict[str, Any] = json.loads(body) if body else {}
        self._service = SERVICES.get(path, "other")
        if "a" in (asked.get("prompt"), asked.get("input"), asked.get("query")):
            self._service = "probe"
        rule = server.rule_for(self._service)
        server.story.tell("request", service=self._service, number=server.number(self._service), path=path)
        if server.story.plan.get("log_requests"):
            say(f"0.00.100.000 I srv  log_server_r: request: {path} 127.0.0.1 {200 if server.loaded else 503}")
        if await self._misbehave(rule):
            return
        if not server.loaded:
            self.error(503, "Loading model")
        elif path not in ("/health", "/v1/models") and headers.get("authorization") != f"Bearer {server.key}":
            server.story.tell("refused", path=path)
            self.error(401, "Invalid API Key")
        elif self._service in ("health", "other"):
            self._small(path)
        else:
            server.busy.add(self)
            await Exchange(self, path, asked, rule).run()
            server.story.tell("answered", service=self._service, sent=self._sent)

    def _small(self, path: str) -> None:
        if path == "/health":
            self.reply(200, {"status": "ok"})
        elif path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": self.server.options.get("--alias", "")}]})
        elif path == "/slots":
            count = int(self.server.options.get("--parallel", "1"))
            busy = len(self.server.busy)
            self.reply(200, [{"id": slot, "is_processing": slot < busy} for slot in range(count)])
        else:
            self.error(404, "File Not Found")

    async def _misbehave(self, rule: dict[str, Any]) -> bool:
        """Do what comes in the place of an answer. False: an answer follows."""
        what = rule["do"]
        if what == "status":
            self.error(rule["status"], rule.get("message", "overloaded"))
        elif what == "answer":
            self.reply(200, rule["body"])
        elif what == "block":
            self.server.block(rule)
            return False
        elif what == "stop":
            self.server.stop_the_world()
            return False
        elif what == "say":
            say(rule["text"])
            return False
        elif what == "flood":
            flood(rule["fd"], rule["mib"], solid=bool(rule.get("solid")))
            return False
        elif what == "die" and rule.get("after") is None:
            if rule.get("hangup"):
                self._task = None  # which would be cancelled
                self.transport.abort()
                await asyncio.sleep(0.05)
            self.server.die(rule)
        else:
            return await self._break_off(rule)
        return True

    async def _break_off(self, rule: dict[str, Any]) -> bool:
        """The connection's own faults."""
        what = rule["do"]
        sock: socket.socket = self.transport.get_extra_info("socket")
        if what == "close":
            self.transport.close()
        elif what == "close_writing":
            self.transport.write_eof()
            await self._for_ever()
        elif what == "reset":
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        elif what == "deaf":
            self._deaf = True
            sock.shutdown(socket.SHUT_RD)
            await self._for_ever()
        elif what == "hang" and rule.get("after") is None:
            await self._for_ever()
        elif what == "head":
            self.transport.write(head(200, "content-type: text/event-stream", "transfer-encoding: chunked"))
            await self._for_ever()
        elif what == "garbage":
            await self._garbage(rule)
        elif what in ("truncated", "length"):
            self._truncate(rule)
        else:
            return False
        return True

    async def _garbage(self, rule: dict[str, Any]) -> None:
        self.transport.write(b"\x16\x03\x01\x02\x00 no HTTP at all \xff\xfe" * 8)
        while rule.get("endless"):
            self.transport.write(b"\xff" * 65536)
            await self._writable.wait()
            await asyncio.sleep(0)
        if rule.get("open"):
            await self._for_ever()
        self.transport.close()

    def _truncate(self, rule: dict[str, Any]) -> None:
        if rule["do"] == "length":
            self.transport.write(head(200, f"content-length: {11 + rule['by']}") + b'{"some": 1}')
        elif rule["where"] == "head":
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-ty")
        elif rule["where"] == "body":
            self.transport.write(head(200, "content-length: 1000") + b'{"some": 1}')
        else:
            self.transport.write(head(200, "transfer-encoding: chunked") + b'3e8\r\ndata: {"choices')
        self.transport.close()

    async def _for_ever(self) -> None:
        await asyncio.get_running_loop().create_future()

    # Writing

    def reply(self, status: int, shape: Any) -> None:
        body = json.dumps(shape).encode()
        self.transport.write(head(status, "content-type: application/json", f"content-length: {len(body)}") + body)

    def error(self, status: int, message: str) -> None:
        kinds = {400: "invalid_request_error", 401: "authentication_error", 503: "unavailable_error"}
        kind = kinds.get(status, "server_error")
        self.reply(status, {"error": {"code": status, "message": message, "type": kind}})

    async def event(self, shape: Any) -> None:
        """One event of a stream, in a chunk of its own."""
        data = b"data: " + (shape if isinstance(shape, bytes) else json.dumps(shape).encode()) + b"\n\n"
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        await self._writable.wait()

    def count_token(self) -> None:
        self._sent += 1


def head(status: int, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} -", "server: llama.cpp", *lines, "", ""]).encode("latin-1")


class Exchange:
    """One request that is answered, in the end or in part."""

    def __init__(self, connection: Connection, path: str, asked: dict[str, Any], rule: dict[str, Any]) -> None:
        self._connection = connection
        self._server = connection.server
        self._path = path
        self._asked = asked
        self._rule = rule
        self._plan = connection.server.story.plan
        self._streams = SERVICES[path] in ("chat", "generate") and bool(asked.get("stream"))

    async def run(self) -> None:
        service = SERVICES[self._path]
        if self._streams:
            await self._stream(chat=service == "chat")
            return
        await self._interfere(0)
        if service == "embed":
            given = self._asked["input"]
            texts = given if isinstance(given, list) else [given]
            data = [{"object": "embedding", "index": at, "embedding": [1.0, 0.0]} for at in range(len(texts))]
            self._connection.reply(200, {"object": "list", "data": data, "usage": usage(1)})
        elif service == "rerank":
            documents = self._asked["documents"]
            data = [{"index": at, "relevance_score": -float(at)} for at in range(len(documents))]
            self._connection.reply(200, {"object": "list", "results": data, "usage": usage(1)})
        else:
            self._connection.reply(200, self._whole(chat=service == "chat"))

    def _whole(self, *, chat: bool) -> dict[str, Any]:
        text = "".join(f"w{number} " for number in range(self._wanted()))
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": "stop"}
        return {**self._frame(chat=chat, chunk=False), "choices": [choice], "usage": usage(self._wanted())}

    def _wanted(self) -> int:
        return int(self._asked.get("max_tokens") or self._plan.get("tokens", TOKENS))

    def _frame(self, *, chat: bool, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" if chat else "text_completion"
        if chat and chunk:
            kind += ".chunk"
        return {"id": "fake", "object": kind, "created": 1, "model": self._server.options.get("--alias", "")}

    async def _stream(self, *, chat: bool) -> None:
        connection = self._connection
        connection.transport.write(head(200, "content-type: text/event-stream", "transfer-encoding: chunked"))
        self._server.story.tell("begun", service=SERVICES[self._path])
        frame = self._frame(chat=chat, chunk=True)

        def step(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {**frame, "choices": [{"index": 0, **delta, "finish_reason": reason}]}

        if chat:
            await connection.event(step({"delta": {"role": "assistant", "content": None}}))
        wanted, interval, number = self._wanted(), self._plan.get("interval", 0), 0
        while wanted < 0 or number < wanted:
            if await self._interfere(number):
                return
            text = f"w{number} "
            await connection.event(step({"delta": {"content": text}} if chat else {"text": text}))
            connection.count_token()
            number += 1
            await asyncio.sleep(interval)
        if await self._interfere(number):
            return
        await connection.event(step({"delta": {}} if chat else {"text": ""}, "stop"))
        if self._asked.get("stream_options", {}).get("include_usage"):
            await connection.event({**frame, "choices": [], "usage": usage(number)})
        await connection.event(b"[DONE]")
        connection.transport.write(b"0\r\n\r\n")

    async def _interfere(self, number: int) -> bool:
        """What the rule says for this token. True: the stream is over."""
        rule = self._rule
        if rule.get("after", 0 if rule["do"] == "hold" else None) != number:
            return False
        if rule["do"] == "hold":
            await self._server.until(rule["until"])
        elif rule["do"] == "hang":
            await asyncio.get_running_loop().create_future()
        elif rule["do"] == "die":
            self._server.die(rule)
        elif rule["do"] in ("event", "cut") and self._streams:
            if rule["do"] == "event":
                await self._connection.event(rule["data"])
            self._connection.transport.write(b"0\r\n\r\n")
            return True
        return False


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}


def main(argv: list[str], script: str) -> None:
    """Live one life. `script` is where the script is unless FAKE_ENGINE names another."""
    signal.alarm(LIFETIME)
    if argv[:1] == ["--linger"]:
        linger(argv[1])
        return
    if argv[:1] == ["--outlive"]:
        outlive(int(argv[1]))
        return
    options = parse(argv)
    story = Story(Path(os.environ.get("FAKE_ENGINE") or script), options.get("--alias", ""))
    asyncio.run(FakeServer(options, story).run())


if __name__ == "__main__":
    main(sys.argv[1:], "")
