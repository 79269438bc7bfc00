"""Images in a chat: at most 16, and 64 million pixels together, whatever the engine."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.ollama.native import native_validator
from engine_plugin.errors import InvalidRequestError
from engine_plugin.services import VALIDATORS
from engine_plugin.services.pictures import size_of

Image = pytest.importorskip("PIL.Image")

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")
LARGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (8000).to_bytes(4, "big") * 2 + bytes(9)
"""The head of a picture of 64 million pixels."""


def written(form: str, size: tuple[int, int], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, form, **options)
    return file.getvalue()


@pytest.mark.promise("X6")
@pytest.mark.parametrize("form", FORMATS)
def test_image_size_is_read_from_its_header(form: str) -> None:
    assert size_of(written(form, (123, 45))) == (123, 45)


@pytest.mark.promise("X6")
def test_image_size_is_found_after_camera_metadata() -> None:
    assert size_of(written("JPEG", (123, 45), exif=b"Exif\0\0" + bytes(60_000), progressive=True)) == (123, 45)
    assert size_of(written("WEBP", (123, 45), lossless=True)) == (123, 45)
    assert size_of(written("WEBP", (123, 45), exif=b"Exif\0\0" + bytes(100))) == (123, 45)


@given(st.binary(max_size=60), st.sampled_from([b"", b"\xff\xd8", b"RIFF\0\0\0\0WEBPVP8X", b"BM", LARGE[:12]]))
def test_arbitrary_bytes_have_a_size_or_none(data: bytes, head: bytes) -> None:
    width, height = size_of(head + data)
    assert width >= 0
    assert height >= 0


def chat(*pictures: bytes) -> bytes:
    urls = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()


@pytest.mark.promise("X6")
def test_too_many_images_or_pixels_are_rejected_by_field() -> None:
    read = VALIDATORS["chat"].read
    small = written("PNG", (8, 8))
    assert read(chat(*[small] * 16))
    assert read(chat(LARGE))
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.content\[16\]\.image_url: is one picture too"):
        read(chat(*[small] * 17))
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.content\[1\]\.image_url: has 8000 x 8000 pixels"):
        read(chat(small, LARGE))
    assert read(chat(b"no picture"))  # the engine says so
    addresses = [{"type": "image_url", "image_url": "https://example.org/a.png"}] * 3
    assert read(json.dumps({"messages": [{"role": "user", "content": addresses}]}).encode())


@pytest.mark.promise("X6")
def test_images_in_native_ollama_requests_are_counted() -> None:
    image = base64.b64encode(LARGE).decode()
    for service, request in (
        ("chat", {"messages": [{"role": "user", "content": "a", "images": [image, image]}]}),
        ("generate", {"prompt": "a", "images": [image, image]}),
    ):
        for contract in (native_validator(service), VALIDATORS[service]):
            assert contract is not None
            with pytest.raises(InvalidRequestError, match=r"images\[1\]: has 8000 x 8000 pixels"):
                contract.read(json.dumps(request).encode())
