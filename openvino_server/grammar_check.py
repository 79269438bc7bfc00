"""The grammar check: `python -m openvino_server.grammar_check`, spawned by a chat model's worker.

The first frame on stdin is the model's folder, each later one a grammar. The answer to each is one string: the error,
or "". A grammar that crashes the compiler ends this process; the worker kills it if a grammar takes too long.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from engine_plugin.process.entry import bound_memory
from openvino_server.frames import own_pipes, receive
from openvino_server.trimming import trim_openvino

__all__ = ["main"]

_MEMORY = 4 << 30  # bytes of address space, in addition to those in use at the start


def main() -> None:
    """Answer until stdin ends."""
    stdin, channel = own_pipes()
    (folder,) = receive(stdin)
    trim_openvino()
    import openvino_genai

    tokenizer = openvino_genai.Tokenizer(folder)
    model = _model_of_nothing(tokenizer)
    bound_memory(_MEMORY)
    channel.send(("",))
    while True:
        (grammar,) = receive(stdin)
        channel.send((_complaint_about(grammar, tokenizer, model),))


def _complaint_about(given: tuple[Any, ...], tokenizer: Any, model: Any) -> str:
    import openvino_genai

    from openvino_server.pipelines.grammars import Grammar

    trial = openvino_genai.GenerationConfig(max_new_tokens=1, apply_chat_template=False)
    trial.set_eos_token_id(max(tokenizer.get_eos_token_id(), 0))
    try:
        trial.structured_output_config = Grammar(*given).config()
        model.generate("a", trial)
    except Exception as error:  # noqa: BLE001  # the compiler's words, whatever they come in
        return _words(error)
    return ""


def _words(error: Exception) -> str:
    """The compiler's error message, without the position in its source code."""
    last = (str(error).strip() or type(error).__name__).splitlines()[-1]
    _, found, words = last.partition(".cc:")
    return (words.partition(": ")[2] if found else last).strip() or last


def _model_of_nothing(tokenizer: Any) -> Any:
    """A minimal language model with a constant output, with which GenAI compiles grammars as for a real model."""
    import numpy as np
    import openvino
    import openvino_genai
    from openvino import opset13 as ops

    inputs = [
        ops.parameter([-1] * rank, kind, name=name)
        for name, rank, kind in (
            ("input_ids", 2, np.int64),
            ("attention_mask", 2, np.int64),
            ("beam_idx", 1, np.int32),
        )
    ]
    for parameter in inputs:
        parameter.output(0).set_names({parameter.get_friendly_name()})
    nothing = ops.constant(np.float32(0))
    ids, *others = [ops.multiply(ops.convert(parameter, "f32"), nothing) for parameter in inputs]
    for other, rank in zip(others, (2, 1), strict=True):
        ids = ops.add(ids, ops.reduce_sum(other, ops.constant(list(range(rank))), keep_dims=False))
    size = max(tokenizer.get_vocab().values()) + 1
    logits = ops.add(ops.unsqueeze(ids, ops.constant(2)), ops.constant(np.zeros((1, 1, size), np.float32)))
    logits.output(0).set_names({"logits"})
    model = openvino.Model([ops.result(logits)], inputs, "nothing")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nothing.xml"
        openvino.serialize(model, file)
        text, weights = file.read_text(encoding="utf-8"), np.fromfile(file.with_suffix(".bin"), np.uint8)
    return openvino_genai.LLMPipeline(text, openvino.Tensor(weights), tokenizer, "CPU", ATTENTION_BACKEND="SDPA")


if __name__ == "__main__":
    try:
        main()
    except (EOFError, OSError):
        pass
    os._exit(0)  # does not wait for a busy compiler
