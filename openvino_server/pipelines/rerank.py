"""Reranking: OpenVINO GenAI's TextRerankPipeline."""

from __future__ import annotations

from typing import Any

from engine_plugin.errors import InvalidRequestError
from openvino_server.pipelines import Job, OneAtATime, PipelineSettings, json_file
from openvino_server.pipelines.embed import Tokens

__all__ = ["Served"]

_EVERY = 1 << 20  # the pipeline's own default returns the best three only


class Served(OneAtATime):
    """A rerank model. Made by `pipelines.load`."""

    def __init__(self, settings: PipelineSettings) -> None:
        import openvino_genai

        options = settings.options
        config = openvino_genai.TextRerankPipeline.Config()
        config.top_n = _EVERY
        limit = options.get("max_position_embeddings")
        limit = limit or json_file(settings.path / "config.json").get("max_position_embeddings")
        if limit:
            config.max_length = int(limit)
        self._most = int(options.get("max_allowed_chunks") or 10000)
        self._pipeline = openvino_genai.TextRerankPipeline(
            settings.path, settings.device, config, **settings.properties()
        )
        self._tokens = Tokens(settings.path)
        self.facts = {"context_length": limit, "capabilities": ["rerank"]}

    def run(self, job: Job) -> dict[str, Any]:
        query: str = job.request["query"]
        documents: list[str] = job.request["documents"]
        if len(documents) > self._most:
            raise InvalidRequestError.at("documents", f"there are {len(documents)}; at most {self._most} are allowed")
        of_query = self._tokens.count(query)
        counts: list[int] = []
        for document in documents:
            job.check()
            counts.append(self._tokens.count(document))
        if self._tokens.is_empty(of_query) and any(map(self._tokens.is_empty, counts)):
            raise InvalidRequestError.at("query", "the query and a document are empty; at least one must have text")
        scores = []
        for document in documents:
            job.check()
            # One pair at a time: openvino_tokenizers 2026.4 sizes CombineSegments' buffer for one copy of the query,
            # so a batch of three or more pairs with a long query and short documents writes past its end.
            ((_, score),) = self._pipeline.rerank(query, [document])
            scores.append(min(max(float(score), 0.0), 1.0))
        return {"scores": scores, "prompt_tokens": of_query * len(documents) + sum(counts)}
