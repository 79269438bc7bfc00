"""The faults of the contract server, by name.

A model named `fault-NAME:latest` has the fault whenever it is called, pulled or loaded. A rule has it for some
requests only: `POST /contract/rules {"fault": NAME, "path": "/api/chat", "model": "", "times": 1}` ("" means any, 0
times means always). The first matching rule counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ANSWERS", "PULLS", "REFUSALS", "SIGN_IN", "STREAMS", "Rule", "Rules", "fault_in"]

SIGN_IN = "https://ollama.com/connect?name=contract&key=c3NoLWVkMjU1MTk"

REFUSALS: dict[str, tuple[int, dict[str, Any]]] = {
    "busy": (503, {"error": "server busy, please try again.  maximum pending requests exceeded"}),
    "sign-in": (401, {"error": "unauthorized", "signin_url": SIGN_IN}),
    "forbidden": (403, {"error": "ollama cloud is disabled: remote model is unavailable"}),
    "canceled": (499, {"error": "request canceled"}),
    "crashed": (
        500,
        {
            "error": "model runner has unexpectedly stopped, this may be due to resource limitations or an internal "
            "error, check ollama server logs for details"
        },
    ),
    "memory": (500, {"error": "model requires more system memory (9.5 GiB) than is available (3.2 GiB)"}),
    "loading": (500, {"error": "timed out waiting for llama runner to start - progress 0.35 - "}),
    "context": (400, {"error": "the input length exceeds the context length"}),
    "error-first": (500, {"error": "an error was encountered while running the model"}),
    "gateway": (502, {"error": "no such host"}),
}
"""Errors in place of an answer."""

STREAMS = {
    "error": 'some words, then {"error": …} as the last line',
    "no-done": "some words, then a proper end of the body, but never the object with done",
    "cut": "some words, then the connection closes within a line",
    "last-words": "the object with done has the last words",
    "all-at-once": "a single object, with all the words and done",
    "slow": "50 ms between tokens",
    "stall": "two tokens, then nothing until the reader leaves",
    "silent": "not even headers, until the reader leaves",
    "gated": "two tokens, then nothing until `POST /contract/open`",
    "endless": "tokens until the reader leaves",
    "crumbs": "the bytes of the lines come in pieces of seven",
    "burst": "all lines in one piece",
    "garbage": "a line that is not JSON",
    "zero": "no counts and no durations in the last object, as Go leaves zeros out",
    "empty": "the last object only",
    "tool-no-id": "tool calls without an id, as from older servers",
    "tool-last": "the last object has the call, as when llama.cpp parses it",
    "tool-twice": "two tool calls, in two objects",
    "tags": "thinking in the text, in <think> tags that are cut into pieces",
    "tags-twice": "two blocks of it",
    "tags-closed": "only the closing tag",
    "tags-open": "only the opening tag",
}
"""Forms of a stream. Unstreamed answers have those that apply."""

ANSWERS = {
    "html": "502 with a page of HTML, as a proxy sends",
    "hang-up": "the connection is closed without an answer",
}

PULLS = {
    "pull-breaks": "an error in the middle, with status 200",
    "pull-no-success": "everything but the last line",
    "pull-cut": "the connection closes in the middle",
    "pull-digest": "the digest of the download is wrong",
    "pull-disk": "the disk is full",
    "pull-slow": "20 ms between the lines of a layer",
    "pull-stall": "nothing more after some lines, until the reader leaves",
    "pull-gated": "nothing more after some lines, until `POST /contract/open`",
    "pull-offline": "the server cannot reach the registry",
    "pull-quiet": "no layers are reported, since all are present",
    "pull-unauthorized": "the registry denies access",
    "pull-restart": "a layer's count decreases, as when a part is fetched again",
}

_MARK = "fault-"


@dataclass
class Rule:
    """A fault for some requests; `times` 0 means all."""

    fault: str
    path: str = ""
    model: str = ""
    times: int = 0

    def fits(self, path: str, model: str) -> bool:
        """Whether the rule matches a request."""
        return (not self.path or self.path == path) and (not self.model or self.model == model)


class Rules:
    """The active rules."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def add(self, rule: Rule) -> None:
        """Add a rule."""
        self._rules.append(rule)

    def clear(self) -> None:
        """Remove all rules."""
        self._rules.clear()

    def take(self, path: str, model: str) -> str:
        """The fault of a request; "" for none. Counts down the rule's `times`."""
        for rule in self._rules:
            if rule.fits(path, model):
                if rule.times:
                    rule.times -= 1
                    if not rule.times:
                        self._rules.remove(rule)
                return rule.fault
        return fault_in(model)


def fault_in(model: str) -> str:
    """The fault in a model's name; "" for none."""
    return model.removeprefix(_MARK).partition(":")[0] if model.startswith(_MARK) else ""
