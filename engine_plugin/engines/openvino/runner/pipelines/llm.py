"""Language models: all calls of a model together, by OpenVINO GenAI's ContinuousBatchingPipeline.

One thread does everything, for a step of the pipeline lets no other one run: it takes what has come, makes a step,
and sends what that brought for all streams in one frame. Each answer of a call with n > 1 is a request of its own to
the pipeline, which would bring them only at their end otherwise; the prompt is computed once and cached.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.openvino.runner import chat
from engine_plugin.engines.openvino.runner.pipelines import (
    CANCELLED,
    RequestError,
    json_file,
    reason,
    too_long,
)
from engine_plugin.engines.openvino.runner.pipelines.sampling import Grammars, Params, flag
from engine_plugin.engines.openvino.runner.pipelines.scheduling import context_length, open_pipeline, pool_tokens
from engine_plugin.engines.openvino.runner.pipelines.text import Detokenizer, StopStrings
from engine_plugin.engines.openvino.runner.pipelines.vision import pictures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.engines.openvino.runner.frames import Channel, Frame, Inbox
    from engine_plugin.engines.openvino.runner.pipelines import Settings

__all__ = ["load"]

_ROOM = 1 << 20  # tokens, where neither the model nor the call says how many
_ALL = 1 << 30

Part = tuple[int, Any, int, "list[dict[str, Any]] | None", "str | None"]


def load(settings: Settings) -> _Llm:
    """The server of a language model; called by `pipelines.load`."""
    return _Llm(settings)


class _Call:
    """One call: some streams, and what all of them have used."""

    def __init__(self, number: int, params: Params) -> None:
        self.number = number
        self.params = params
        self.streams: list[_Stream] = []
        self.prompt_tokens = 0
        self.tokens = 0
        self.going = 0
        self.echoes: list[Part] = []

    def usage(self) -> dict[str, Any]:
        """The done payload."""
        return {
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.tokens,
                "total_tokens": self.prompt_tokens + self.tokens,
            }
        }


class _Stream:
    """One sequence that is generated, and what makes text of it."""

    def __init__(self, call: _Call, index: int, text: Any, deltas: chat.Deltas | None) -> None:
        params = call.params
        self.call = call
        self.index = index
        self.handle: Any = None
        self.text = text
        self.deltas = deltas
        self.stops = StopStrings(params.stops, params.keep_stop) if params.stops else None
        self.logprobs = params.logprobs
        self.kept: list[Part] | None = [] if params.best_of > params.n else None
        self.score = 0.0
        self.untold = 0  # tokens that no part has counted
        self.waiting: list[dict[str, Any]] = []  # log probabilities that no part has brought
        self.ended = False


class _Llm:
    """See Server."""

    def __init__(self, settings: Settings) -> None:
        import openvino_genai

        self._genai = openvino_genai
        options = settings.options
        self._running = openvino_genai.GenerationStatus.RUNNING
        self._pipeline, self._sees = open_pipeline(settings)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._base = self._pipeline.get_config()
        self._stop_tokens = set(self._base.stop_token_ids) | {self._base.eos_token_id}
        self._detokenizer = Detokenizer(self._tokenizer)
        self._grammars = Grammars(self._tokenizer)
        self._best_of_limit = int(options.get("best_of_limit") or 20)
        self._tokens_limit = int(options.get("max_tokens_limit") or 0)
        self._template = chat.Template(settings.path, lambda: self._tokenizer.chat_template)
        self._dialect = chat.Dialect(self._template.source, options)
        self._context = context_length(json_file(settings.path / "config.json"))
        pool = pool_tokens(self._pipeline, settings)
        self._room = min(size for size in (self._context, pool, _ROOM) if size)
        self._calls: dict[int, _Call] = {}
        self._live: list[_Stream] = []
        self._requests = itertools.count(1)
        self._frames: list[Frame] = []
        self.facts: dict[str, Any] = {
            "context_length": self._context,
            "capabilities": ["completion", *self._template.capabilities(), *(["vision"] if self._sees else [])],
        }

    def serve(self, inbox: Inbox, channel: Channel) -> None:
        """See Server."""
        while True:
            busy = bool(self._live) or self._pipeline.has_non_finished_requests()
            while not busy or not inbox.empty():
                frame = inbox.get()
                if frame[0] == "quit":
                    return
                self._take(frame)
                busy = True
            if self._live or self._pipeline.has_non_finished_requests():
                self._step(channel)
            if self._frames:
                channel.send(*self._frames)
                self._frames.clear()

    # Calls

    def _take(self, frame: Frame) -> None:
        verb, number, *rest = frame
        if verb == "cancel":
            self._cancel(number)
        elif verb == "do":
            try:
                self._begin(number, rest[0])
            except RequestError as error:
                self._drop(number)
                self._frames.append(("error", number, error.status, error.kind, str(error)))
            except Exception as error:  # noqa: BLE001  # one bad call must not end the others
                traceback.print_exc()
                self._drop(number)
                self._frames.append(("error", number, 500, "server_error", reason(error)))

    def _begin(self, number: int, request: dict[str, Any]) -> None:
        params = request.get("params") or {}
        call = self._calls[number] = _Call(number, Params(params, self._best_of_limit, self._tokens_limit))
        if request["op"] == "chat":
            self._begin_chat(call, request, params)
        elif request["op"] == "complete":
            self._begin_completion(call, request, params)
        else:
            raise RequestError(f"{request['op']!r} is nothing that a language model does")
        if call.echoes:
            self._frames.append(("part", [(number, call.echoes)]))

    def _begin_chat(self, call: _Call, request: dict[str, Any], params: dict[str, Any]) -> None:
        messages, sources = chat.messages(request.get("messages"), self._sees)
        tools = chat.tools(request.get("tools"), request.get("tool_choice"))
        prompt = self._template.render(messages, tools.offered, params.get("chat_template_kwargs"))
        grammar = self._grammars.wanted(params)
        forced = self._dialect.grammar(self._genai.StructuredOutputConfig, tools)
        if forced is not None:
            grammar = self._genai.StructuredOutputConfig(compound_grammar=forced)
            self._grammars.prove(grammar, f"tools:{tools.key}", "tools")
        images = pictures(sources)
        tokens = None if self._sees else self._encode(prompt, special=False)
        plan = self._dialect.plan(tools, prompt, guided=grammar is not None)
        self._add(call, 0, prompt if tokens is None else tokens, grammar, images, plan)

    def _begin_completion(self, call: _Call, request: dict[str, Any], params: dict[str, Any]) -> None:
        prompts = request.get("prompt")
        if isinstance(prompts, str) or (isinstance(prompts, list) and prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not isinstance(prompts, list) or not prompts:
            raise RequestError("prompt: must be a text, a list of texts or a list of tokens, not empty")
        grammar = self._grammars.wanted(params)
        echo = flag(request, "echo", False)
        for index, prompt in enumerate(prompts):
            given: Any = prompt if isinstance(prompt, str) and self._sees else self._prompt_tokens(prompt)
            if echo:
                text = prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt))
                first = index * call.params.n
                call.echoes += [(first + one, text, 0, None, None) for one in range(call.params.n)]
            self._add(call, index * call.params.n, given, grammar, [], None)

    def _prompt_tokens(self, prompt: Any) -> Any:
        import numpy as np
        import openvino

        if isinstance(prompt, str):
            return self._encode(prompt, special=True)
        if not isinstance(prompt, list) or not all(isinstance(token, int) and token >= 0 for token in prompt):
            raise RequestError("prompt: must be a text, a list of texts or a list of tokens")
        return openvino.Tensor(np.array([prompt], dtype=np.int64))

    def _encode(self, text: str, special: bool) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=special, max_length=_ALL).input_ids

    def _add(
        self, call: _Call, first: int, prompt: Any, grammar: Any, images: Sequence[Any], plan: chat.Plan | None
    ) -> None:
        """Give the pipeline the streams of one prompt: tokens, or the text where the model sees."""
        params = call.params
        tokens = self._encode(prompt, special=False) if isinstance(prompt, str) else prompt
        count = int(tokens.shape[1])
        if not count:
            raise RequestError("prompt: is empty, and the model needs something to go on from")
        if count >= self._room:
            raise too_long("prompt", count, self._room)
        call.prompt_tokens += count
        for one in range(params.best_of):
            config = params.config(self._pipeline.get_config(), self._room - count, grammar, params.seed + one)
            special = plan is not None and plan.special
            stream = _Stream(call, first + one, self._detokenizer.stream(special), plan.deltas() if plan else None)
            number = next(self._requests)
            if isinstance(prompt, str):
                stream.handle = self._pipeline.add_request(number, prompt, list(images), config)
            else:
                stream.handle = self._pipeline.add_request(number, tokens, config)
            call.streams.append(stream)
            call.going += 1
            self._live.append(stream)

    def _cancel(self, number: int) -> None:
        if self._drop(number):
            self._frames.append(("error", number, *CANCELLED))

    def _drop(self, number: int) -> bool:
        """Forget a call and have the pipeline do so; whether there was one."""
        call = self._calls.pop(number, None)
        if call is None:
            return False
        for stream in call.streams:
            if not stream.ended:
                stream.handle.cancel()
        self._live = [stream for stream in self._live if stream.call is not call]
        return True

    # Steps

    def _step(self, channel: Channel) -> None:
        try:
            self._pipeline.step()
        except Exception as error:
            traceback.print_exc()
            for number in self._calls:  # a pipeline that failed once fails ever after; the runner starts a new one
                self._frames.append(("error", number, 500, "server_error", reason(error)))
            channel.send(*self._frames)
            sys.stderr.write(f"the pipeline failed: {reason(error)}\n")
            raise SystemExit(1) from error
        parts: dict[int, list[Part]] = {}
        ended = False
        for stream in self._live:
            handle = stream.handle
            if handle.can_read():
                (output,) = handle.read().values()
                done = handle.get_status() != self._running
                self._hear(stream, output, done, parts)
                ended = ended or stream.ended
            elif handle.get_status() != self._running:
                self._end(stream, parts, "", "length" if stream.call.tokens else None)
                ended = True
        self._tell(parts, ended)

    def _tell(self, parts: dict[int, list[Part]], ended: bool) -> None:
        if ended:
            finished = {stream.call.number: stream.call for stream in self._live if not stream.call.going}
            self._live = [stream for stream in self._live if not stream.ended]
            for number, call in finished.items():
                if call.params.best_of > call.params.n:
                    parts.setdefault(number, []).extend(_best(call))
        if parts:
            self._frames.append(("part", list(parts.items())))
        if ended:
            for number, call in finished.items():
                if self._calls.pop(number, None) is not None:
                    self._frames.append(("done", number, call.usage()))

    def _hear(self, stream: _Stream, output: Any, done: bool, parts: dict[int, list[Part]]) -> None:
        """What a step has brought for one stream."""
        tokens = output.generated_ids
        count = len(tokens)
        call = stream.call
        call.tokens += count
        stream.untold += count
        if stream.logprobs or stream.kept is not None:
            self._hear_logprobs(stream, tokens, output.generated_log_probs)
        finish = None
        if done:
            finish = "length" if output.finish_reason == self._genai.GenerationFinishReason.LENGTH else "stop"
            if finish == "stop" and tokens and tokens[-1] in self._stop_tokens and not call.params.ignore_eos:
                tokens = tokens[:-1]
        text = stream.text.feed(tokens) if tokens else ""
        if stream.stops is not None and text:
            text, hit = stream.stops.feed(text)
            if hit:
                stream.handle.stop()
                self._end(stream, parts, text, "stop", cut=True)
                return
        if done:
            self._end(stream, parts, text, finish)
        elif text:
            if stream.deltas is None and stream.kept is None and not stream.logprobs:
                part = (stream.index, text, stream.untold, None, None)
                stream.untold = 0
                number = call.number
                if number in parts:
                    parts[number].append(part)
                else:
                    parts[number] = [part]
            else:
                self._show(stream, parts, text)

    def _hear_logprobs(self, stream: _Stream, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        stream.score += sum(logprobs)
        if stream.logprobs:
            for token, logprob in zip(tokens, logprobs, strict=False):
                text, data = self._detokenizer.token(token)
                chosen = {"token": text, "logprob": float(logprob), "bytes": list(data)}
                stream.waiting.append({**chosen, "top_logprobs": [chosen]})

    def _show(self, stream: _Stream, parts: dict[int, list[Part]], text: str, finish: str | None = None) -> None:
        """Make parts of text: those that a template's marks divide it into."""
        deltas: list[Any] = [text] if text else []
        if stream.deltas is not None:
            deltas = stream.deltas.feed(text) if text else []
            if finish is not None:
                deltas += stream.deltas.end()
                finish = stream.deltas.finish(finish)
        found: list[Part] = []
        for delta in deltas:
            found.append((stream.index, delta, stream.untold, stream.waiting or None, None))
            stream.untold, stream.waiting = 0, []
        if finish is not None:
            found.append((stream.index, "", stream.untold, stream.waiting or None, finish))
            stream.untold, stream.waiting = 0, []
        if stream.kept is not None:
            stream.kept += found
        elif found:
            parts.setdefault(stream.call.number, []).extend(found)

    def _end(
        self, stream: _Stream, parts: dict[int, list[Part]], text: str, finish: str | None, cut: bool = False
    ) -> None:
        """A stream has ended. Without a reason to finish it could not even begin."""
        stream.ended = True
        stream.call.going -= 1
        if finish is None:
            self._refuse(stream.call)
            return
        if not cut:
            rest = stream.text.end()
            if stream.stops is not None:
                rest, hit = stream.stops.feed(rest)
                rest += "" if hit else stream.stops.end()
            text += rest
        self._show(stream, parts, text, finish)

    def _refuse(self, call: _Call) -> None:
        if self._calls.pop(call.number, None) is None:
            return
        for stream in call.streams:
            if not stream.ended:
                stream.ended = True
                stream.handle.cancel()
        message = f"no memory is left for the prompt's {call.prompt_tokens} tokens; try again, or raise cache_size"
        self._frames.append(("error", call.number, 503, "unavailable_error", message))


def _best(call: _Call) -> list[Part]:
    """The parts of the n most likely of the best_of streams of each prompt, numbered anew."""
    params = call.params
    found: list[Part] = []
    prompts = len(call.streams) // params.best_of
    for prompt in range(prompts):
        streams = call.streams[prompt * params.best_of : (prompt + 1) * params.best_of]
        for place, stream in enumerate(sorted(streams, key=_likelihood, reverse=True)[: params.n]):
            found += [(prompt * params.n + place, *part[1:]) for part in stream.kept or []]
    return found


def _likelihood(stream: _Stream) -> float:
    """Of a token of the stream, on average."""
    told = sum(part[2] for part in stream.kept or [])
    return stream.score / max(told, 1)
