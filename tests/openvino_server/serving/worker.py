"""A worker that follows scripts of the tests. Run as a file; it uses the server's frames and computes nothing.

A model's folder may hold script.json: {"load": "fail" | "crash" | "noise" | "hang" | "compute",
"template": a chat template}. A chat's `script`
parameter says what happens to the call: "parts" to send, and "then": done (the default), hold (until another call
says release, or it is cancelled), compute (for "seconds", deaf meanwhile; load does so, too), delegate (the same in a
process of its own), mute (stdout is closed, and the process goes on), crash, noise, class (a frame that names one),
error, flood (parts without end, until it is cancelled). "report" answers with the numbers of cancelled calls,
"settings" with the request.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine_plugin.process import guard
from openvino_server.frames import encode

CONTEXT_ERROR = (400, "exceed_context_size_error", "prompt: too long")


class Worker:
    def __init__(self) -> None:
        self.out = os.dup(1)
        os.dup2(2, 1)
        self.held: list[int] = []
        self.floods: set[int] = set()
        self.cancelled: list[int] = []
        self.buffer = b""

    def send(self, *frame: Any) -> None:
        self.write(encode(frame))

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.out, data) :]

    def frames(self) -> Any:
        while True:
            while len(self.buffer) >= 4 and len(self.buffer) >= 4 + struct.unpack_from(">I", self.buffer)[0]:
                end = 4 + struct.unpack_from(">I", self.buffer)[0]
                data, self.buffer = self.buffer[4:end], self.buffer[end:]
                yield pickle.loads(data)  # noqa: S301  # the runner's own
            if self.floods:
                parts = [(number, [(0, "x" * 1000, 1, None, None)] * 20) for number in self.floods]
                self.send("part", parts)
                if not select.select([0], [], [], 0)[0]:
                    continue
            data = os.read(0, 65536)
            if not data:
                os._exit(0)
            self.buffer += data

    def run(self) -> None:
        for frame in self.frames():
            verb, *rest = frame
            if verb == "load":
                self.load(rest[0])
            elif verb == "quit":
                return
            elif verb == "cancel":
                self.cancelled.append(rest[0])
                self.floods.discard(rest[0])
                self.send("error", rest[0], 499, "cancelled", "the call was cancelled")
            else:
                self.do(rest[0], rest[1])

    def load(self, settings: dict[str, Any]) -> None:
        script = Path(settings["path"]) / "script.json"
        told = json.loads(script.read_text()) if script.exists() else {}
        way = told.get("load")
        if way == "compute":
            compute(told["seconds"])
        if way == "fail":
            self.send("failed", told.get("text", "no such luck"), False)
        elif way == "crash":
            sys.stderr.write("libvery.so: cannot open\n")
            os._exit(7)
        elif way == "noise":
            self.write(b"Hello, I am a library, and I print what I like to print\n")
        elif way != "hang":
            templates: tuple[Any, Any] = ({"default": told.get("template", "{{ messages[0].content }}")}, {})
            self.send("ready", {"context_length": 64, "capabilities": [settings["kind"]], "templates": templates})

    def do(self, number: int, request: dict[str, Any]) -> None:
        getattr(self, request["op"])(number, request)

    def chat(self, number: int, request: dict[str, Any]) -> None:
        script = request["params"].get("script") or {}
        if script.get("report"):
            parts = [(0, json.dumps(self.cancelled), 1, None, "stop")]
        elif script.get("settings"):
            parts = [(0, json.dumps(request), 1, None, "stop")]
        else:
            parts = [tuple(part) for part in script.get("parts", [(0, "hi", 1, None, "stop")])]
        for part in parts:
            self.send("part", [(number, [part])])
        if script.get("release"):
            for held in self.held:
                self.done(held)
            self.held.clear()
        self.then(number, script.get("then", "done"), script.get("seconds", 0))

    def then(self, number: int, what: str, seconds: float) -> None:
        if what == "done":
            self.done(number)
        elif what == "compute":
            compute(seconds)
            self.done(number)
        elif what == "delegate":
            subprocess.run([sys.executable, __file__, str(seconds)], check=True)
            self.done(number)
        elif what == "hold":
            self.held.append(number)
        elif what == "mute":
            os.close(self.out)
        elif what == "flood":
            self.floods.add(number)
        elif what == "crash":
            sys.stderr.write("terminate called\nSegmentation fault, nearly\n")
            sys.stderr.flush()
            os._exit(11)
        elif what == "noise":
            self.write(b"\x00\x00\x00\x04abcd")
        elif what == "class":
            data = pickle.dumps(("done", number, Path("/")))
            self.write(struct.pack(">I", len(data)) + data)
        elif what == "error":
            self.send("error", number, *CONTEXT_ERROR)

    complete = chat

    def done(self, number: int) -> None:
        self.send("done", number, {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})

    def embed(self, number: int, request: dict[str, Any]) -> None:
        given = request["input"]
        inputs = [given] if isinstance(given[0], int) else given
        vectors = [struct.pack("<3f", 1, 0.5, len(item)) for item in inputs]
        self.send("done", number, {"vectors": vectors, "prompt_tokens": len(vectors)})

    def rerank(self, number: int, request: dict[str, Any]) -> None:
        scores = [len(text) / 10 for text in request["documents"]]
        self.send("done", number, {"scores": scores, "prompt_tokens": 9})

    def image(self, number: int, request: dict[str, Any]) -> None:
        for step in range(2):
            self.send("part", [(number, [(step + 1, 2)])])
        self.send("done", number, {"images": [json.dumps(request).encode()]})

    def transcribe(self, number: int, request: dict[str, Any]) -> None:
        samples = struct.unpack(f"<{len(request['audio']) // 4}f", request["audio"])
        text = json.dumps({"count": len(samples), "peak": round(max(samples), 3), "task": request["task"]})
        segments, words = [(0.0, 0.5, "a b")], [(0.0, 0.2, "a"), (0.2, 0.5, "b")]
        language = {"language": request["language"]} if request["language"] else {}
        self.send("done", number, {"text": text, "segments": segments, "words": words, **language})

    def speak(self, number: int, request: dict[str, Any]) -> None:
        self.send("done", number, {"pcm": struct.pack("<4f", 0, 0.5, -2, 1), "rate": 16000})


def compute(seconds: float) -> None:
    """Hold the interpreter's lock for some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1_000_000))


if __name__ == "__main__":
    guard.arm()
    if sys.argv[1:]:
        compute(float(sys.argv[1]))
    else:
        Worker().run()
    os._exit(0)
