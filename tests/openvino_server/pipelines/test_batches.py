"""Texts in a batch get the same results as alone, and tokens outside the vocabulary are rejected."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio

from .running import SAMPLES, CallFailed, RunningWorker, worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")

POOLINGS = ("MEAN", "CLS", "LAST")
QUERIES = ("", "q", "What is the capital of France?", " ".join(["what"] * 40))
COUNTS = (1, 2, 3, 20, 33)
LENGTHS = (0, 0, 1, 1, 2, 5, 30, 200)


def texts(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)  # noqa: S311  # the same texts each time
    return ["".join(chance.choices("ab cd", k=chance.choice(LENGTHS))) for _ in range(count)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rerank() -> AsyncIterator[RunningWorker]:
    async with worker("rerank", SAMPLES / "tiny-rerank") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=POOLINGS)
async def embed(request: pytest.FixtureRequest) -> AsyncIterator[RunningWorker]:
    async with worker("embed", SAMPLES / "tiny-embed", pooling=request.param) as running:
        yield running


@pytest.mark.promise("S1")
async def test_short_documents_under_a_long_query_are_ranked(rerank: RunningWorker) -> None:
    answer = await rerank.do("rerank", query="What is the capital of France?", documents=["Paris", "Rome", "Oslo"])
    assert len(answer["scores"]) == 3
    titles = [f"Title {number}" for number in range(20)]
    answer = await rerank.do("rerank", query=" ".join(["capital"] * 12), documents=titles)
    assert len(answer["scores"]) == 20


@pytest.mark.promise("S1")
@pytest.mark.parametrize("query", QUERIES)
async def test_documents_score_together_as_they_do_alone(rerank: RunningWorker, query: str) -> None:
    for count in COUNTS:
        documents = [text or "a" if not query else text for text in texts(count, count)]
        together = (await rerank.do("rerank", query=query, documents=documents))["scores"]
        alone = [(await rerank.do("rerank", query=query, documents=[text]))["scores"][0] for text in documents]
        assert together == pytest.approx(alone, abs=1e-4)


@pytest.mark.promise("S1")
async def test_texts_have_the_same_vectors_together_and_alone(embed: RunningWorker) -> None:
    for count in (*COUNTS, 65):
        given = texts(count, count)
        together = (await embed.do("embed", input=given))["vectors"]
        alone = [(await embed.do("embed", input=[text]))["vectors"][0] for text in given]
        assert len(together) == count
        for one, other in zip(together, alone, strict=True):
            assert np.frombuffer(one, "<f4") == pytest.approx(np.frombuffer(other, "<f4"), abs=1e-4)


@pytest.mark.promise("S1")
async def test_every_empty_text_has_a_vector(embed: RunningWorker) -> None:
    assert len((await embed.do("embed", input=["", "", "a", "", ""]))["vectors"]) == 5
    assert len((await embed.do("embed", input=["", ""]))["vectors"]) == 2


@pytest.mark.promise("S2")
@pytest.mark.parametrize(
    ("given", "place"),
    [
        ([[57668, 53901]], "input[0][0]: 57668"),
        ([[69, -1]], "input[0][1]: -1"),
        (["hello", [100000]], "input[1][0]: 100000"),
        ([69, 351], "input[1]: 351"),
    ],
)
async def test_token_outside_the_vocabulary_is_rejected(embed: RunningWorker, given: Any, place: str) -> None:
    with pytest.raises(CallFailed) as told:
        await embed.do("embed", input=given)
    assert told.value.status == 400
    assert told.value.message.startswith(place)
    assert "351 tokens" in told.value.message


@pytest.mark.promise("S2")
async def test_tokens_have_the_vector_of_their_text(embed: RunningWorker) -> None:
    of_text, of_tokens, flat = [
        (await embed.do("embed", input=given))["vectors"][0] for given in (["a b"], [[69, 225, 70]], [69, 225, 70])
    ]
    assert of_text == of_tokens == flat
