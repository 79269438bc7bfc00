"""Embeddings: OpenVINO GenAI's TextEmbeddingPipeline."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from engine_plugin.errors import InvalidRequestError
from openvino_server.errors import RequestError
from openvino_server.pipelines import Job, OneAtATime, PipelineSettings, json_file, too_long
from openvino_server.pipelines.text import LONGEST_TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["Served"]

_BATCH = 32  # texts in a batch, which bounds memory; a cancel takes effect between two batches


class Served(OneAtATime):
    """An embedding model. Made by `pipelines.load`."""

    def __init__(self, settings: PipelineSettings) -> None:
        import openvino_genai

        options = settings.options
        pooling = _pooling(settings.path, options)
        config = openvino_genai.TextEmbeddingPipeline.Config()
        config.pooling_type = getattr(openvino_genai.TextEmbeddingPipeline.PoolingType, pooling)
        config.normalize = bool(options.get("normalize_embeddings", True))
        # With padding on the left, the positions of a text would depend on the longer texts in its batch. The pooling
        # finds the last token by the attention mask.
        config.padding_side = "right"
        limit = json_file(settings.path / "config.json").get("max_position_embeddings")
        self._limit: int | None = limit if isinstance(limit, int) else None
        self._truncate = bool(options.get("truncate", False))
        if self._truncate and self._limit:
            config.max_length = self._limit
        self._pipeline = openvino_genai.TextEmbeddingPipeline(
            settings.path, settings.device, config, **settings.properties()
        )
        self._tokens = Tokens(settings.path)
        self.facts = {"context_length": self._limit, "capabilities": ["embedding"]}

    def run(self, job: Job) -> dict[str, Any]:
        texts = self._texts(job.request["input"])
        if self._truncate and self._limit:
            texts = [text[: self._limit * LONGEST_TOKEN] for text in texts]
        counts: list[int] = []
        for index, text in enumerate(texts):
            job.check()
            counts.append(self._count(text, f"input[{index}]"))
        vectors: list[bytes] = []
        for start, end in self._batches(counts):
            job.check()
            found = self._pipeline.embed_documents(texts[start:end])
            vectors += [row.tobytes() for row in np.asarray(found, dtype="<f4")]
        return {"vectors": vectors, "prompt_tokens": sum(counts)}

    def _count(self, text: str, field: str) -> int:
        """The number of tokens of a text after truncation. Raises RequestError when there are too many."""
        if not self._limit:
            return self._tokens.count(text)
        least = (len(text) - 1) // LONGEST_TOKEN  # tokenizing takes a second for some megabytes
        count = least if least > self._limit else self._tokens.count(text)
        if count > self._limit and not self._truncate:
            raise too_long(field, count, self._limit, least=least > self._limit)
        return int(min(count, self._limit))

    def _batches(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The ranges of texts that form a batch. A text without tokens of its own is a batch by itself, because
        openvino_tokenizers 2026.4 makes a single row of several such texts."""
        start = 0
        for place, count in enumerate(counts):
            is_empty = self._tokens.is_empty(count)
            if start < place and (is_empty or place - start == _BATCH):
                yield start, place
                start = place
            if is_empty:
                yield place, place + 1
                start = place + 1
        if start < len(counts):
            yield start, len(counts)

    def _texts(self, given: list[Any]) -> list[str]:
        if isinstance(given[0], int):
            return [self._tokens.text(given, "input")]
        return [
            item if isinstance(item, str) else self._tokens.text(item, f"input[{index}]")
            for index, item in enumerate(given)
        ]


class Tokens:
    """Counts all tokens of a text, also beyond the length at which the model's tokenizer truncates."""

    def __init__(self, path: Path) -> None:
        import openvino_genai

        self._path = path
        self._tokenizer = openvino_genai.Tokenizer(path)
        self._of_nothing = self.count("")

    @functools.cached_property
    def _vocabulary(self) -> frozenset[int] | range:
        """The size of the vocabulary, from the tokenizer, else from the model."""
        try:
            return frozenset(self._tokenizer.get_vocab().values())
        except RuntimeError:
            return range(json_file(self._path / "config.json").get("vocab_size") or _ALL)

    def count(self, text: str) -> int:
        """The number of tokens of a text, including the special ones of the model."""
        return int(self._tokenizer.encode(text, max_length=_ALL).input_ids.shape[1])

    def is_empty(self, count: int) -> bool:
        """Whether a text with this count has no tokens but the special ones."""
        return count <= self._of_nothing

    def text(self, tokens: Sequence[int], field: str) -> str:
        """The text of some tokens. Raises RequestError, naming field and index, for a token that is not in the
        vocabulary: the detokenizer would omit it."""
        for place, token in enumerate(tokens):
            if token not in self._vocabulary:
                raise InvalidRequestError.at(
                    f"{field}[{place}]",
                    f"{token} is not a token of this model; its vocabulary has {len(self._vocabulary)} tokens, "
                    f"from {min(self._vocabulary)} to {max(self._vocabulary)}",
                )
        return str(self._tokenizer.decode(list(tokens)))


_ALL = 1 << 30


_POOLINGS = {"CLS": "CLS", "LAST": "LAST_TOKEN", "LAST_TOKEN": "LAST_TOKEN", "MEAN": "MEAN"}


def _pooling(path: Path, options: dict[str, Any]) -> str:
    """The pooling of the options, else of the model's sentence-transformers file, else of its kind of model."""
    given = options.get("pooling")
    if given:
        try:
            return _POOLINGS[str(given).upper()]
        except KeyError:
            raise RequestError(f"pooling: {given!r} is not one of CLS, LAST, MEAN") from None
    recorded = json_file(path / "1_Pooling" / "config.json")
    for key, pooling in (
        ("pooling_mode_mean_tokens", "MEAN"),
        ("pooling_mode_lasttoken", "LAST_TOKEN"),
        ("pooling_mode_cls_token", "CLS"),
    ):
        if recorded.get(key):
            return pooling
    causal = any("CausalLM" in name for name in json_file(path / "config.json").get("architectures") or [])
    return "LAST_TOKEN" if causal else "CLS"
