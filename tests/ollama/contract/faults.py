"""Everything that can go wrong at an Ollama, by name.

A model called `fault-NAME:latest` behaves so whenever it is asked, pulled or loaded; a rule makes it so for some
requests only: `POST /contract/rules {"fault": NAME, "path": "/api/chat", "model": "", "times": 1}` ("" means any, 0
times for ever). The first rule that fits counts.
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
"""Answers instead of an answer."""

STREAMS = {
    "error": 'some words, then {"error": …} as the last line',
    "no-done": "some words, then a proper end of the body, but never the object with done",
    "cut": "some words, then the connection breaks off within a line",
    "last-words": "the object with done bears the last words",
    "all-at-once": "a single object, with all the words and done",
    "slow": "50 ms between tokens",
    "stall": "two tokens, then nothing until the reader leaves",
    "silent": "not even headers, until the reader leaves",
    "gated": "two tokens, then nothing until `POST /contract/open`",
    "endless": "tokens until the reader leaves",
    "crumbs": "the bytes of the lines come in pieces of seven",
    "burst": "all lines in one piece",
    "garbage": "a line that is no JSON",
    "zero": "no counts and no durations in the last object, as Go leaves zeros out",
    "empty": "the last object only",
    "tool-no-id": "tools are called without an id, as older servers do",
    "tool-last": "the last object bears the call, as it does where llama.cpp finds it",
    "tool-twice": "two calls of tools, in two objects",
    "tags": "thinking within the text, in <think> tags that are cut into pieces",
    "tags-twice": "two blocks of it",
    "tags-closed": "only the closing tag",
    "tags-open": "only the opening tag",
}
"""How a stream may go; without a stream those that make sense there."""

ANSWERS = {
    "html": "502 with a page of HTML, as a proxy sends",
    "hang-up": "the connection is closed without a word",
}

PULLS = {
    "pull-breaks": "an error in the middle, the status being 200",
    "pull-no-success": "everything but the last line",
    "pull-cut": "the connection breaks off in the middle",
    "pull-digest": "the digest of what came is another",
    "pull-disk": "the disk is full",
    "pull-slow": "20 ms between the lines of a layer",
    "pull-stall": "nothing more after some lines, until the reader leaves",
    "pull-gated": "nothing more after some lines, until `POST /contract/open`",
    "pull-offline": "the server has no way to the registry",
    "pull-quiet": "no layers are told, since all are here already",
    "pull-unauthorized": "the registry wants somebody else",
    "pull-restart": "a layer's count goes back, as it does when a part is fetched again",
}

_MARK = "fault-"


@dataclass
class Rule:
    """One fault for some requests; `times` 0: for all of them."""

    fault: str
    path: str = ""
    model: str = ""
    times: int = 0

    def fits(self, path: str, model: str) -> bool:
        """Whether a request is meant."""
        return (not self.path or self.path == path) and (not self.model or self.model == model)


class Rules:
    """The rules that are in force."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def add(self, rule: Rule) -> None:
        """One more."""
        self._rules.append(rule)

    def clear(self) -> None:
        """None any more."""
        self._rules.clear()

    def take(self, path: str, model: str) -> str:
        """The fault of a request, "" for none. A rule for some times is used up so."""
        for rule in self._rules:
            if rule.fits(path, model):
                if rule.times:
                    rule.times -= 1
                    if not rule.times:
                        self._rules.remove(rule)
                return rule.fault
        return fault_in(model)


def fault_in(model: str) -> str:
    """The fault that a model's name names."""
    return model.removeprefix(_MARK).partition(":")[0] if model.startswith(_MARK) else ""
