"""A running call to a language model: its streams, and their parts that have not been sent yet.

The text of several steps is joined before it is sent, because a fast model makes more steps than a client can read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openvino_server.pipelines.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvino_server.dialect import Plan
    from openvino_server.pipelines.sampling import Params

__all__ = ["CallStreams", "Part", "Stream"]

Part = tuple[int, Any, int, "list[dict[str, Any]] | None", "str | None"]
"""Index, delta (text, or the members of OpenAI's delta), token count, log probabilities, finish reason."""


class CallStreams:
    """One call: its streams, and the tokens that all of them have used."""

    def __init__(self, number: int, params: Params) -> None:
        self.number = number
        self.params = params
        self.streams: list[Stream] = []
        self.prompt_tokens = 0
        self.tokens = 0
        self.going = 0
        """Streams that have not ended."""
        self.weighs = params.logprobs or params.best_of > params.n
        """Whether log probabilities are needed."""
        self.echoes: list[Part] = []

    def usage(self) -> dict[str, Any]:
        """The payload of the call's `done` frame."""
        total = self.prompt_tokens + self.tokens
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}
        return {"usage": usage}

    def best(self) -> list[Part]:
        """The parts of the n most likely of the best_of streams of each prompt, numbered anew."""
        n, best_of = self.params.n, self.params.best_of
        found: list[Part] = []
        for first in range(0, len(self.streams), best_of):
            ranked = sorted(self.streams[first : first + best_of], key=Stream.likelihood, reverse=True)
            for place, stream in enumerate(ranked[:n]):
                found += [(first // best_of * n + place, *part[1:]) for part in stream.take()]
        return found


class Stream:
    """One generated sequence of a call, from its tokens to the parts that are sent."""

    def __init__(self, call: CallStreams, index: int, detokenizer: Detokenizer, plan: Plan | None) -> None:
        params = call.params
        self.call = call
        self.index = index
        self.handle: Any = None
        self.ended = False
        self.ranked = params.best_of > params.n
        """Whether only the best streams of the call are sent (best_of), after all have ended."""
        self._detokenizer = detokenizer
        self._text = detokenizer.stream(special=plan is not None and plan.special)
        self._deltas = plan.deltas() if plan is not None else None
        self._stops = StopStrings(params.stops, params.keep_stop) if params.stops else None
        self._logprobs = params.logprobs
        self._plain = plan is None and not params.logprobs
        self._pending = ""
        self._uncounted = 0  # tokens that are not in a part yet
        self._beside: list[dict[str, Any]] = []  # log probabilities for the next part
        self._parts: list[Part] = []
        self._tokens = 0
        self._score = 0.0

    def feed(self, tokens: Sequence[int]) -> bool:
        """Take new tokens. Returns False when their text ends at a stop string."""
        text = self._text.feed(tokens)
        if not text:
            return True
        going = True
        if self._stops is not None:
            text, hit = self._stops.feed(text)
            going = not hit
        if self._plain:
            self._pending += text
        else:
            self._show(text)
        return going

    def count(self, tokens: int) -> None:
        """Count generated tokens, with or without text."""
        self._uncounted += tokens
        self.call.tokens += tokens

    def weigh(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add the log probabilities of tokens."""
        self._tokens += len(tokens)
        self._score += sum(logprobs)
        if self._logprobs:
            for token, logprob in zip(tokens, logprobs, strict=False):
                text, data = self._detokenizer.token(token)
                chosen = {"token": text, "logprob": float(logprob), "bytes": list(data)}
                self._beside.append({**chosen, "top_logprobs": [chosen]})

    def likelihood(self) -> float:
        """The mean log probability of a token."""
        return self._score / max(self._tokens, 1)

    def end(self, finish: str, cut: bool = False) -> None:
        """Finish the text. `cut`: a stop string has ended it already."""
        self.ended = True
        self.call.going -= 1
        if not cut:
            rest = self._text.end()
            if self._stops is not None:
                rest, hit = self._stops.feed(rest)
                rest += "" if hit else self._stops.end()
            self._pending += rest
        if self._deltas is not None:
            self._show(self._pending)
            for delta in self._deltas.end():
                self._add(delta)
            finish = self._deltas.finish(finish)
        elif self._pending:
            self._add(self._pending)
        self._pending = ""
        self._add("", finish)

    def take(self) -> list[Part]:
        """Return the parts that have not been sent, and forget them."""
        if self._pending:
            self._add(self._pending)
            self._pending = ""
        parts, self._parts = self._parts, []
        return parts

    def _show(self, text: str) -> None:
        """Add the parts into which the dialect divides the text."""
        if text:
            for delta in [text] if self._deltas is None else self._deltas.feed(text):
                self._add(delta)

    def _add(self, delta: Any, finish: str | None = None) -> None:
        self._parts.append((self.index, delta, self._uncounted, self._beside or None, finish))
        self._uncounted = 0
        if self._beside:
            self._beside = []
