"""The workers that compute one call at a time, in their processes, with the sample models."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from .running import SAMPLES, CallFailed, RunningWorker, WorkerFailed, worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.asyncio(loop_scope="module")


def module_worker(kind: str, sample: str, **options: Any) -> Any:
    """A fixture of a worker for all tests of this module."""

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    async def running() -> AsyncIterator[RunningWorker]:
        async with worker(kind, SAMPLES / sample, **options) as found:
            yield found

    return running


embed = module_worker("embed", "tiny-embed", pooling="MEAN")
rerank = module_worker("rerank", "tiny-rerank")
image = module_worker("text-to-image", "tiny-image", default_num_inference_steps=3)
transcribe = module_worker("speech-to-text", "tiny-transcribe")
speak = module_worker("text-to-speech", "tiny-speak")


def tone(seconds: float) -> bytes:
    return (np.sin(np.arange(int(16000 * seconds)) / 20) * 0.3).astype("<f4").tobytes()


async def test_embeddings_are_vectors_of_length_one(embed: RunningWorker) -> None:
    texts = [f"text {number}" for number in range(40)]
    answer = await embed.do("embed", input=[*texts, [69, 225, 70]])
    vectors = [np.frombuffer(vector, "<f4") for vector in answer["vectors"]]
    assert len(vectors) == 41
    assert all(vector.shape == (32,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-3) for vector in vectors)
    assert answer["prompt_tokens"] > 40


async def test_vector_of_a_text_does_not_depend_on_its_batch(embed: RunningWorker) -> None:
    alone = (await embed.do("embed", input=["hello"]))["vectors"][0]
    beside = (await embed.do("embed", input=["a much longer text than hello", "hello"]))["vectors"][1]
    assert np.frombuffer(alone, "<f4") == pytest.approx(np.frombuffer(beside, "<f4"), abs=1e-3)


async def test_normalization_can_be_disabled() -> None:
    async with worker("embed", SAMPLES / "tiny-embed", normalize_embeddings=False, pooling="LAST") as running:
        (vector,) = (await running.do("embed", input=["hello"]))["vectors"]
        assert abs(np.linalg.norm(np.frombuffer(vector, "<f4")) - 1) > 0.01


@pytest.mark.parametrize("given", [None, [], 5, [None], [[]], [["a"]]])
async def test_invalid_embedding_input_is_rejected(embed: RunningWorker, given: Any) -> None:
    with pytest.raises(CallFailed, match="input") as told:
        await embed.do("embed", input=given)
    assert told.value.status == 400


async def test_token_ids_out_of_range_are_rejected(embed: RunningWorker) -> None:
    with pytest.raises(CallFailed, match=r"^400 \w+: input\[0\]\[0\]: "):
        await embed.do("embed", input=[[1 << 70]])


async def test_text_beyond_the_context_is_rejected_or_truncated(embed: RunningWorker) -> None:
    with pytest.raises(CallFailed) as told:
        await embed.do("embed", input=["ok", "hello " * 1000])
    assert (told.value.status, told.value.kind) == (400, "exceed_context_size_error")
    assert "input[1]: 2002 tokens" in told.value.message
    with pytest.raises(CallFailed, match=r"input\[0\]: at least \d+ tokens"):
        await embed.do("embed", input=["hello " * (1 << 20)])
    async with worker("embed", SAMPLES / "tiny-embed", truncate=True) as running:
        for length in (1000, 1 << 20):
            assert (await running.do("embed", input=["hello " * length]))["prompt_tokens"] == 512


async def test_unknown_pooling_fails_the_load() -> None:
    with pytest.raises(WorkerFailed, match="pooling"):
        async with worker("embed", SAMPLES / "tiny-embed", pooling="BEST"):
            pass


async def test_plugin_config_reaches_openvino() -> None:
    with pytest.raises(WorkerFailed, match="NO_SUCH_PROPERTY"):
        async with worker("embed", SAMPLES / "tiny-embed", plugin_config='{"NO_SUCH_PROPERTY": 1}'):
            pass


async def test_every_document_gets_a_score(rerank: RunningWorker) -> None:
    documents = [f"document {number}" for number in range(40)]
    answer = await rerank.do("rerank", query="hello", documents=documents)
    assert len(answer["scores"]) == 40
    assert all(0 <= score <= 1 for score in answer["scores"])
    alone = await rerank.do("rerank", query="hello", documents=documents[33:34])
    assert alone["scores"][0] == pytest.approx(answer["scores"][33], abs=1e-3)


@pytest.mark.parametrize("request_", [{"documents": ["a"]}, {"query": "a", "documents": [5]}, {"query": "a"}])
async def test_invalid_rerank_request_is_rejected(rerank: RunningWorker, request_: dict[str, Any]) -> None:
    with pytest.raises(CallFailed) as told:
        await rerank.do("rerank", **request_)
    assert told.value.status == 400


async def test_empty_query_with_an_empty_document_is_rejected(rerank: RunningWorker) -> None:
    with pytest.raises(CallFailed, match=r"^400 \w+: query: "):
        await rerank.do("rerank", query="", documents=["", ""])


async def test_pictures_are_png_of_the_requested_size(image: RunningWorker) -> None:
    call = image.begin("image", prompt="a cat", width=72, height=64, n=2, seed=7, guidance=3.0, negative_prompt="dog")
    pictures = (await call.done())["images"]
    for picture in pictures:
        with Image.open(io.BytesIO(picture)) as opened:
            assert (opened.format, opened.size) == ("PNG", (72, 64))
    assert call.progress == [(step, 6) for step in range(1, 7)]
    assert pictures[0] != pictures[1]


async def test_every_step_of_a_picture_is_reported_by_a_busy_worker() -> None:
    program = (str(Path(__file__).with_name("busy.py")),)
    async with worker("text-to-image", SAMPLES / "tiny-image", program=program) as running:
        for _ in range(10):
            call = running.begin("image", prompt="a cat", width=64, height=64, steps=3)
            await call.done()
            assert call.progress == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.promise("S13")
@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
async def test_pictures_have_the_requested_format(image: RunningWorker, form: str) -> None:
    (picture,) = (await image.do("image", prompt="a cat", width=64, height=64, steps=1, format=form))["images"]
    with Image.open(io.BytesIO(picture)) as opened:
        assert (opened.format, opened.size) == (form.upper(), (64, 64))


async def test_seed_repeats_the_picture(image: RunningWorker) -> None:
    first = await image.do("image", prompt="a cat", seed=7, steps=1)
    again = await image.do("image", prompt="a cat", seed=7, steps=1)
    other = await image.do("image", prompt="a cat", seed=8, steps=1)
    assert first["images"] == again["images"] != other["images"]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"width": 60}, "size"),
        ({"height": 100000}, "size"),
        ({"steps": 0}, "num_inference_steps"),
        ({"steps": 101}, "num_inference_steps"),
        ({"n": 11}, "n"),
        ({"seed": -1}, "seed"),
        ({"guidance": "x"}, "guidance_scale"),
        ({"guidance": 1, "negative_prompt": "x"}, "negative_prompt"),
    ],
)
async def test_invalid_image_request_is_rejected(image: RunningWorker, wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(CallFailed) as told:
        await image.do("image", **({"prompt": "a cat"} | wrong))
    assert told.value.status == 400
    assert told.value.message.startswith(field)


async def test_running_and_queued_pictures_are_cancelled(image: RunningWorker) -> None:
    running = image.begin("image", prompt="a cat", width=256, height=256, steps=100, n=10)
    waiting = image.begin("image", prompt="a cat")
    last = image.begin("image", prompt="a cat")
    await running.begun()
    image.cancel(waiting)
    with pytest.raises(CallFailed) as told:
        await waiting.done()
    assert told.value.status == 499
    assert not running.result.done()
    image.cancel(running)
    with pytest.raises(CallFailed) as told:
        await running.done()
    assert told.value.status == 499
    assert running.progress[-1][0] < 1000
    assert len((await last.done())["images"]) == 1


async def test_speech_is_transcribed_in_segments(transcribe: RunningWorker) -> None:
    answer = await transcribe.do("transcribe", audio=tone(3), language="de")
    assert answer["text"]
    assert answer["language"] == "de"
    assert answer["segments"][0][:2] == (0.0, 3.0)


async def test_long_speech_is_transcribed_completely(transcribe: RunningWorker) -> None:
    call = transcribe.begin("transcribe", audio=tone(70))
    answer = await call.done()
    assert answer["segments"][-1][1] == 70.0
    assert [step for step, _ in call.progress] == [0, 480000, 960000]


async def test_words_have_times(transcribe: RunningWorker) -> None:
    answer = await transcribe.do("transcribe", audio=tone(2), words=True, temperature=0.5, task="translate")
    assert isinstance(answer["words"], list)


async def test_very_short_audio_is_transcribed(transcribe: RunningWorker) -> None:
    assert "text" in await transcribe.do("transcribe", audio=tone(0.001))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"language": "tlh"}, "language"),
        ({"task": "sing"}, "task"),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_invalid_transcription_request_is_rejected(
    transcribe: RunningWorker, wrong: dict[str, Any], field: str
) -> None:
    with pytest.raises(CallFailed) as told:
        await transcribe.do("transcribe", **({"audio": tone(1)} | wrong))
    assert told.value.status == 400
    assert told.value.message.startswith(field)


async def test_long_transcription_can_be_cancelled(transcribe: RunningWorker) -> None:
    call = transcribe.begin("transcribe", audio=tone(10 * 60))
    await call.begun()
    transcribe.cancel(call)
    with pytest.raises(CallFailed) as told:
        await call.done()
    assert told.value.status == 499
    assert call.progress[-1][0] < 16000 * 60 * 9


async def test_text_is_spoken(speak: RunningWorker) -> None:
    answer = await speak.do("speak", text="hello")
    wave = np.frombuffer(answer["pcm"], "<f4")
    assert answer["rate"] == 16000
    assert len(wave) > 1000
    assert np.isfinite(wave).all()


async def test_long_text_is_spoken_piece_by_piece(speak: RunningWorker) -> None:
    call = speak.begin("speak", text="Hello there, how are you? " * 4)
    wave = (await call.done())["pcm"]
    assert len(call.progress) > 1
    assert len(wave) > 50_000


async def test_speed_changes_the_length(speak: RunningWorker) -> None:
    plain, fast = [len((await speak.do("speak", text="hi", speed=speed))["pcm"]) for speed in (1.0, 2.0)]
    assert fast == pytest.approx(plain / 2, rel=0.05)


@pytest.mark.parametrize("wrong", [{"text": " "}, {"text": None}, {"text": "a", "speed": 9}])
async def test_invalid_speech_request_is_rejected(speak: RunningWorker, wrong: dict[str, Any]) -> None:
    with pytest.raises(CallFailed) as told:
        await speak.do("speak", **wrong)
    assert told.value.status == 400


async def test_voices_are_files_of_speaker_embeddings(tmp_path: Path) -> None:
    np.linspace(-1, 1, 512, dtype="<f4").tofile(tmp_path / "anna.bin")
    np.save(tmp_path / "bert.npy", np.zeros(512, np.float32))
    voices = [
        {"name": name, "path": str(tmp_path / file)} for name, file in (("anna", "anna.bin"), ("bert", "bert.npy"))
    ]
    async with worker("text-to-speech", SAMPLES / "tiny-speak", voices=voices) as running:
        assert running.facts["voices"] == ["anna", "bert"]
        anna, bert = [(await running.do("speak", text="hi", voice=name))["pcm"] for name in ("anna", "bert")]
        assert anna != bert
        with pytest.raises(CallFailed, match="not one of default, anna, bert"):
            await running.do("speak", text="hi", voice="carl")
    (tmp_path / "anna.bin").write_bytes(b"1234")
    with pytest.raises(WorkerFailed, match="has 1 values"):
        async with worker("text-to-speech", SAMPLES / "tiny-speak", voices=voices):
            pass


async def test_concurrent_calls_are_all_answered(embed: RunningWorker) -> None:
    answers = await asyncio.gather(*(embed.do("embed", input=[f"{number}"]) for number in range(20)))
    assert len({answer["vectors"][0] for answer in answers}) == 20
