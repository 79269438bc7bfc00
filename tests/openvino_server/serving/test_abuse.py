"""Malformed and hostile requests are rejected with the field's name, and the models keep answering."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import InvalidRequestError
from openvino_server import wav
from tests.openvino_server.serving.test_answers import wav_file

if TYPE_CHECKING:
    from tests.openvino_server.serving.conftest import Front, Serve

CHAT = "/v3/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
async def front(serve: Serve) -> Front:
    return await serve()


async def refused(front: Front, body: bytes, path: str = CHAT, status: int = 400, **headers: str) -> str:
    """The message of the error, which must have this status and be JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with front.session.post(path, data=body, headers=JSON | named) as response:
        answer = await response.json()
        assert response.status == status, answer
        assert answer["error"]["type"] == "invalid_request_error"
        message: str = answer["error"]["message"]
        return message


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}


@pytest.mark.promise("S11")
@pytest.mark.parametrize(
    ("text", "read"), [("\ud800", "\ufffd"), ("a\udfff", "a\ufffd"), ("\ude00\ud83d", "\ufffd\ufffd")]
)
async def test_unpaired_surrogate_becomes_the_replacement_character(front: Front, text: str, read: str) -> None:
    status, answer = await front.chat(user=text, script={"settings": True})
    assert status == 200
    assert json.loads(answer["choices"][0]["message"]["content"])["params"]["user"] == read


async def test_surrogate_pair_is_one_character(front: Front) -> None:
    status, answer = await front.chat(user="\U0001f600", script={"settings": True})
    assert status == 200
    assert json.loads(answer["choices"][0]["message"]["content"])["params"]["user"] == "\U0001f600"


async def test_body_with_bytes_that_are_not_utf8_is_rejected(front: Front) -> None:
    assert "not UTF-8" in await refused(front, b'{"model":"m","messages":"\xed\xa0\x80"}')


@pytest.mark.parametrize("depth", [600, 900, 100_000])
async def test_body_nested_too_deeply_is_rejected_without_a_pending_call(front: Front, depth: int) -> None:
    body = json.dumps(chat_body())[:-1] + ', "metadata": ' + "[" * depth + "]" * depth + "}"
    await refused(front, body.encode())
    async with front.registry.models["m"].use() as worker:
        assert not worker.owes


async def test_body_with_wrong_content_encoding_is_rejected(front: Front) -> None:
    assert "body" in await refused(front, b"nothing", Content_Encoding="gzip")


async def test_wrong_method_is_a_405(front: Front) -> None:
    await refused(front, b"", "/v3/models", 405)


async def test_error_message_quotes_a_bounded_part_of_the_request(front: Front) -> None:
    assert len(await refused(front, json.dumps(chat_body(stream="x" * 100_000)).encode())) < 3000


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\nnonsense\r\n\r\nabc\r\n--x--\r\n",
        b"--x\r\nX: " + b"a" * 100_000 + b"\r\n\r\nabc\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' * 100 + b"--x--\r\n",
    ],
    ids=["header", "long", "many"],
)
async def test_malformed_multipart_body_is_rejected(front: Front, body: bytes) -> None:
    told = await refused(front, body, "/v3/audio/transcriptions", Content_Type="multipart/form-data; boundary=x")
    assert not told.startswith("file: is missing")


async def test_deeply_nested_configuration_changes_nothing(front: Front) -> None:
    front.config.path.write_text("[" * 100_000)
    status, answer = await front.post("/v1/config/reload")
    assert (status, await front.state("m")) == (400, ("AVAILABLE", ""))
    assert "not a valid configuration" in answer["error"]


async def test_invalid_path_fails_only_its_model(front: Front) -> None:
    shape = json.loads(front.config.path.read_text())
    shape["models"].append({"name": "odd", "kind": "chat", "folder": "a\0b"})
    front.config.path.write_text(json.dumps(shape))
    status, _ = await front.post("/v1/config/reload")
    assert (status, await front.state("m")) == (500, ("AVAILABLE", ""))
    assert (await front.state("odd"))[0] == "END"


def test_audio_longer_than_the_limit_is_rejected() -> None:
    data = wav_file(bytes(1000 * 3600 * 6), rate=1000, bits=8)
    with pytest.raises(InvalidRequestError, match="file: is longer than"):
        wav.read_mono(data)


def test_wav_file_with_a_wrong_length_is_read() -> None:
    data = bytearray(wav_file(struct.pack("<2h", 0, 0)))
    struct.pack_into("<I", data, len(data) - 8, 0xFFFFFFFF)
    assert len(wav.read_mono(bytes(data))) == 8
