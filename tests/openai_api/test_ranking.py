"""rerank: scores of any kind become 0..1, best first."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import BadGatewayError
from engine_plugin.openai_api.ranking import ranked_answer


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(1, 30))
def test_documents_are_ranked_by_score(logits: list[float], top: int) -> None:
    results = [{"index": index, "relevance_score": logit} for index, logit in enumerate(logits)]
    answer = json.dumps({"model": "m", "results": results}).encode()
    request = {"documents": [str(logit) for logit in logits], "top_n": top, "return_documents": True}
    ranked = json.loads(ranked_answer(answer, request, raw=True))
    assert ranked["model"] == "m"
    got = ranked["results"]
    assert len(got) == min(top, len(logits))
    assert [result["index"] for result in got] == sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top]
    assert all(0 <= result["relevance_score"] <= 1 for result in got)
    scores = [result["relevance_score"] for result in got]
    assert scores == sorted(scores, reverse=True)
    assert all(result["document"] == {"text": str(logits[result["index"]])} for result in got)


def test_logit_becomes_its_probability() -> None:
    answer = b'{"results":[{"index":0,"relevance_score":0},{"index":1,"relevance_score":-2}]}'
    request = {"documents": ["a", {"text": "b"}]}
    scores = [result["relevance_score"] for result in json.loads(ranked_answer(answer, request, raw=True))["results"]]
    assert scores == pytest.approx([0.5, 1 / (1 + math.exp(2))])


def test_scores_within_0_and_1_are_unchanged_and_others_converted() -> None:
    request = {"documents": ["a", "b"]}
    for scores, wanted in (
        ((0.25, 0.5), [0.5, 0.25]),
        ((0.25, 3), [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-0.25))]),
    ):
        results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
        ranked = json.loads(ranked_answer(json.dumps({"results": results}).encode(), request, raw=False))["results"]
        assert [result["relevance_score"] for result in ranked] == pytest.approx(wanted)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"results":[{}]}',
        b'{"results":[{"index":0}]}',
        b'{"results":[{"index":1,"relevance_score":1}]}',
        b'{"results":[{"index":-1,"relevance_score":1}]}',
    ],
)
def test_malformed_rerank_answer_is_a_bad_gateway_error(answer: bytes, raw: bool) -> None:
    with pytest.raises(BadGatewayError, match="rerank answer is not understood"):
        ranked_answer(answer, {"documents": ["a"]}, raw=raw)
