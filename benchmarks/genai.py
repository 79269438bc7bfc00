"""The baseline: OpenVINO GenAI's continuous batching in a process of its own, with nothing between it and us.

`python -m benchmarks.genai`: the first line of stdin is {"model", "threads", "scheduler"}, every further one a job
{"prompts", "tokens", "text"}. Each is answered with a JSON line on stdout: {"version"}, then {"seconds", "first",
"tokens"}: what all streams of a job took, the seconds to each one's first text, and the tokens of all together.
`text` false: the tokens are counted and not decoded, and the first token stands for the first text.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]


class Stream:
    """One request, whose tokens are decoded to text as they arrive, as for a stream."""

    def __init__(self, genai: Any, handle: Any, tokenizer: Any | None) -> None:
        self.first = 0.0
        self.tokens = 0
        self.text: list[str] = []
        self._handle = handle
        self._running = genai.GenerationStatus.RUNNING
        self._streamer = None if tokenizer is None else genai.TextStreamer(tokenizer, self._take)

    def _take(self, text: str) -> None:
        if text and not self.first:
            self.first = time.perf_counter()
        self.text.append(text)

    def read(self) -> bool:
        """Take what there is; False when there will be no more."""
        while self._handle.can_read():
            for output in self._handle.read().values():
                self.tokens += len(output.generated_ids)
                if self._streamer is not None:
                    self._streamer.write(output.generated_ids)
                elif not self.first:
                    self.first = time.perf_counter()
        if self._handle.get_status() == self._running:
            return True
        if self._streamer is not None:
            self._streamer.end()
        return False


def _pipeline(genai: Any, settings: dict[str, Any]) -> Any:
    scheduler = genai.SchedulerConfig()
    for name, value in settings["scheduler"].items():
        setattr(scheduler, name, value)
    threads = {"INFERENCE_NUM_THREADS": settings["threads"]} if settings["threads"] else {}
    return genai.ContinuousBatchingPipeline(settings["model"], scheduler, "CPU", threads)


def _run(genai: Any, pipeline: Any, job: dict[str, Any]) -> dict[str, Any]:
    config = genai.GenerationConfig()
    config.max_new_tokens = job["tokens"]
    config.ignore_eos = True
    tokenizer = pipeline.get_tokenizer()
    began = time.perf_counter()
    live = []
    for number, prompt in enumerate(job["prompts"]):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        # The template has written what marks the beginning; with another mark before it the prompt would be another.
        handle = pipeline.add_request(number, tokenizer.encode(text, add_special_tokens=False).input_ids, config)
        live.append(Stream(genai, handle, tokenizer if job["text"] else None))
    streams = tuple(live)
    while live:
        pipeline.step()
        live = [stream for stream in live if stream.read()]
    seconds = time.perf_counter() - began
    tokens = sum(stream.tokens for stream in streams)
    return {"seconds": seconds, "first": [stream.first - began for stream in streams], "tokens": tokens}


def _answers() -> Callable[[dict[str, Any]], None]:
    """What writes an answer to the first stdout; what the libraries print goes to stderr."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(shape: dict[str, Any]) -> None:
        print(json.dumps(shape), file=out, flush=True)

    return answer


def main() -> int:
    """Answer jobs until stdin ends."""
    answer = _answers()
    settings = json.loads(sys.stdin.readline())
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # else it asks an analytics host
    import openvino_genai

    pipeline = _pipeline(openvino_genai, settings)
    answer({"version": openvino_genai.__version__})
    for line in sys.stdin:
        answer(_run(openvino_genai, pipeline, json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
