"""Language models: all calls of a model together, by OpenVINO GenAI's ContinuousBatchingPipeline.

One thread does everything, because no other one runs during a step of the pipeline: it takes the frames that have
arrived, makes a step, and sends the new text of all streams in one frame. A call with n > 1 becomes n requests to the
pipeline, because the pipeline would return the answers of one request only after all have ended; the prompt is
computed once and cached.
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from openvino_server import chat
from openvino_server.dialect import Dialect
from openvino_server.pipelines import CANCELLED, json_file, reason, refusal, too_long
from openvino_server.pipelines.grammars import Grammar, Grammars, wanted
from openvino_server.pipelines.sampling import Params
from openvino_server.pipelines.scheduling import context_length, open_pipeline, pool_tokens, vocabulary_size
from openvino_server.pipelines.streams import CallStreams, Part, Stream
from openvino_server.pipelines.text import Detokenizer
from openvino_server.pipelines.vision import pictures
from openvino_server.tool_calls import Tools

if TYPE_CHECKING:
    from openvino_server.dialect import Plan
    from openvino_server.frames import Channel, Frame, Inbox
    from openvino_server.pipelines import PipelineSettings

__all__ = ["Served"]

_ROOM = 1 << 20  # tokens of an answer, if neither the model nor the call has a limit
_ALL = 1 << 30
_GATHER = 0.004  # seconds between frames: a frame for each step would keep the server process busy


class Served:
    """A language model; see `Server`. Made by `pipelines.load`."""

    def __init__(self, settings: PipelineSettings) -> None:
        import openvino_genai

        options = settings.options
        self._is_running = openvino_genai.GenerationStatus.RUNNING
        self._at_length = openvino_genai.GenerationFinishReason.LENGTH
        self._pipeline, self._sees = open_pipeline(settings)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._base = self._pipeline.get_config()
        self._stop_tokens = set(self._base.stop_token_ids) | {self._base.eos_token_id}
        self._detokenizer = Detokenizer(self._tokenizer)
        self._path = settings.path
        self._unchecked: dict[int, tuple[Grammar, dict[str, Any]]] = {}
        """Calls that wait for the check of their grammar."""
        self._best_of_limit = int(options.get("best_of_limit") or 20)
        self._tokens_limit = int(options.get("max_tokens_limit") or 0)
        templates = chat.read_templates(settings.path, lambda: self._tokenizer.chat_template)
        self._dialect = Dialect(templates.text, options)
        config = json_file(settings.path / "config.json")
        self._context = context_length(config)
        self._vocabulary = vocabulary_size(config, self._tokenizer)
        pool = pool_tokens(self._pipeline, settings)
        self._room = min(size for size in (self._context, pool, _ROOM) if size)
        self._calls: dict[int, CallStreams] = {}
        self._live: list[Stream] = []
        self._requests = itertools.count(1)
        self._frames: list[Frame] = []
        self._fresh: dict[Stream, None] = {}
        self._sent_at = 0.0
        self.facts: dict[str, Any] = {
            "context_length": self._context,
            "capabilities": ["completion", *chat.capabilities(templates), *(["vision"] if self._sees else [])],
            "templates": tuple(templates),
        }

    def serve(self, inbox: Inbox, channel: Channel) -> None:
        """See Server."""
        self._grammars = Grammars(self._path, lambda key, complaint: inbox.put(("checked", key, complaint)))
        while True:
            while not inbox.empty() or not self._busy():
                frame = inbox.get()
                if frame[0] == "quit":
                    return
                self._take(frame)
                self._tell()  # the next frame may take long
            if self._frames:
                channel.send(*self._frames)
                self._frames.clear()
            if self._busy():
                self._step(channel)

    def _busy(self) -> bool:
        return bool(self._live or self._frames) or self._pipeline.has_non_finished_requests()

    # Calls

    def _take(self, frame: Frame) -> None:
        verb, number, *rest = frame
        if verb == "cancel":
            if self._drop(number) or self._unchecked.pop(number, None) is not None:
                self._frames.append(("error", number, *CANCELLED))
        elif verb == "checked":
            self._learn(number, rest[0])
        elif verb == "do":
            try:
                self._begin(number, rest[0])
            except Exception as error:  # noqa: BLE001  # one bad call must not end the others
                self._drop(number)
                self._frames.append(refusal(number, error))

    def _learn(self, key: str, complaint: str) -> None:
        """Continue the calls that waited for the check of a grammar."""
        self._grammars.learn(key, complaint)
        for number, (grammar, request) in list(self._unchecked.items()):
            if grammar.key != key:
                continue
            del self._unchecked[number]
            if complaint:
                error = InvalidRequestError.at(grammar.field, f"cannot be applied: {complaint}")
                self._frames.append(refusal(number, error))
            else:
                self._take(("do", number, request))

    def _begin(self, number: int, request: dict[str, Any]) -> None:
        """Begin a call, or the check of its grammar."""
        params = request["params"]
        call = CallStreams(number, Params(params, self._best_of_limit, self._tokens_limit))
        tools = Tools(request.get("tools") or [], request.get("forced") or [])
        forced = self._dialect.forced(tools)
        grammar = Grammar("tools", "tools", forced) if forced else wanted(params)
        if grammar is not None and not self._grammars.is_good(grammar):
            self._unchecked[number] = (grammar, request)
            return
        self._calls[number] = call
        config = grammar.config() if grammar is not None else None
        is_chat = request["op"] == "chat"
        prompts = request["prompt"]  # of a chat: as the model's template rendered it, in a process of its own
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        plan = self._dialect.plan(tools, prompts[0], guided=grammar is not None) if is_chat else None
        images = pictures(request.get("pictures") or [])
        for index, prompt in enumerate(prompts):
            tokens = self._tokens(prompt, special=not is_chat)
            first = index * call.params.n
            if request.get("echo"):
                text = prompt if isinstance(prompt, str) else str(self._tokenizer.decode(prompt))
                call.echoes += [(first + one, text, 0, None, None) for one in range(call.params.n)]
            sees = self._sees and isinstance(prompt, str)
            self._add(call, first, tokens, (prompt, images) if sees else (tokens,), config, plan)
        if call.echoes:
            self._frames.append(("part", [(number, call.echoes)]))

    def _tokens(self, prompt: Any, special: bool) -> Any:
        """The tensor of a prompt, which is a text or tokens; `special`: with the tokens that begin a text."""
        import numpy as np
        import openvino

        if isinstance(prompt, str):
            least = len(prompt) // self._detokenizer.longest  # tokenizing is slow and stops all calls
            if least > self._room:
                raise too_long("prompt", least, self._room, least=True)
            return self._tokenizer.encode(prompt, add_special_tokens=special, max_length=_ALL).input_ids
        if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
            raise InvalidRequestError.at("prompt", "must be a string, a list of strings or a list of tokens")
        if not all(0 <= token < self._vocabulary for token in prompt):
            raise InvalidRequestError.at("prompt", f"the model's tokens are from 0 to {self._vocabulary - 1}")
        return openvino.Tensor(np.array([prompt], dtype=np.int64))

    def _add(
        self, call: CallStreams, first: int, tokens: Any, given: tuple[Any, ...], grammar: Any, plan: Plan | None
    ) -> None:
        """Add the streams of one prompt; `given` to the pipeline are its tokens, or a text and images."""
        params = call.params
        count = int(tokens.shape[1])
        if not count:
            raise InvalidRequestError.at("prompt", "is empty, and this model needs at least one token")
        if count >= self._room:
            raise too_long("prompt", count, self._room)
        call.prompt_tokens += count
        for one in range(params.best_of):
            config = params.config(self._pipeline.get_config(), self._room - count, grammar, params.seed + one)
            stream = Stream(call, first + one, self._detokenizer, plan)
            stream.handle = self._pipeline.add_request(next(self._requests), *given, config)
            call.streams.append(stream)
            call.going += 1
            self._live.append(stream)

    def _drop(self, number: int) -> bool:
        """Cancel a call in the pipeline and forget it. Returns whether there was one."""
        call = self._calls.pop(number, None)
        if call is None:
            return False
        for stream in call.streams:
            self._fresh.pop(stream, None)
            if not stream.ended:
                stream.ended = True
                stream.handle.cancel()
        self._live = [stream for stream in self._live if stream.call is not call]
        call.streams.clear()  # a cycle, which would keep the pipeline's memory until the next collection
        return True

    # Steps

    def _step(self, channel: Channel) -> None:
        try:
            self._pipeline.step()
        except Exception as error:
            self._fail(channel, error)
            raise SystemExit(1) from error
        ended = False
        for stream in self._live:
            handle = stream.handle
            if stream.ended:  # another stream of its call was dropped
                continue
            if handle.can_read():
                try:
                    self._read(stream, handle)
                except Exception as error:  # noqa: BLE001  # a model's text is untrusted input
                    if self._drop(stream.call.number):
                        self._frames.append(refusal(stream.call.number, error))
                ended = ended or stream.ended
            elif handle.get_status() != self._is_running:
                self._ignored(stream)
                ended = True
        if ended:
            self._tell()
            self._finish()
        elif self._fresh and time.monotonic() - self._sent_at > _GATHER:
            self._tell()

    def _read(self, stream: Stream, handle: Any) -> None:
        """Take the new tokens of one stream."""
        (output,) = handle.read().values()
        tokens = output.generated_ids
        stream.count(len(tokens))
        if stream.call.weighs:
            stream.weigh(tokens, output.generated_log_probs)
        done = handle.get_status() != self._is_running and not handle.can_read()
        finish = "length" if done and output.finish_reason == self._at_length else "stop"
        if done and finish == "stop" and tokens and tokens[-1] in self._stop_tokens:
            tokens = tokens[:-1]
        self._fresh[stream] = None
        if tokens and not stream.feed(tokens):
            handle.stop()
            stream.end("stop", cut=True)
        elif done:
            stream.end(finish)

    def _ignored(self, stream: Stream) -> None:
        """End a stream that the pipeline has dropped for lack of memory."""
        call = stream.call
        if call.tokens:
            self._fresh[stream] = None
            stream.end("length")
        elif self._drop(call.number):
            message = (
                f"no memory is left for the {call.prompt_tokens} tokens of the prompt; try later, or raise cache_size"
            )
            self._frames.append(("error", call.number, 503, "unavailable_error", message))

    def _tell(self) -> None:
        """Queue a frame with the new parts of all streams."""
        parts: dict[int, list[Part]] = {}
        for stream in self._fresh:
            if not stream.ranked and (taken := stream.take()):
                parts.setdefault(stream.call.number, []).extend(taken)
        self._fresh.clear()
        if parts:
            self._frames.append(("part", list(parts.items())))
        self._sent_at = time.monotonic()

    def _finish(self) -> None:
        """Queue the `done` frames of calls whose streams have all ended."""
        calls = {stream.call.number: stream.call for stream in self._live if not stream.call.going}
        self._live = [stream for stream in self._live if not stream.ended]
        for number, call in calls.items():
            if self._calls.pop(number, None) is not None:
                if best := call.best() if call.params.best_of > call.params.n else None:
                    self._frames.append(("part", [(number, best)]))
                self._frames.append(("done", number, call.usage()))
            call.streams.clear()  # a cycle, which would keep the pipeline's memory until the next collection

    def _fail(self, channel: Channel, error: Exception) -> None:
        """Report a failed step to all calls. Every later step would fail too, so this process ends."""
        traceback.print_exc()
        text = reason(error)
        channel.send(*self._frames, *(("error", number, 500, "server_error", text) for number in self._calls))
        sys.stderr.write(f"the pipeline failed: {text}\n")
