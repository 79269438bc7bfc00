"""The server's errors as callers see them."""

from __future__ import annotations

import json

import pytest

from engine_plugin.engines.openvino.client import complaint_error
from engine_plugin.errors import InvalidRequestError
from engine_plugin.transport.answers import Complaint

_OF_OVMS = "request_data: the engine refuses it: "


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"message": "temperature: must be a number"}, "temperature: must be a number"),
        ({"message": "tools[0].function.name: is missing"}, "tools[0].function.name: is missing"),
        ({"message": "Mediapipe: temperature is odd"}, f"{_OF_OVMS}Mediapipe: temperature is odd"),
        ("temperature out of range", f"{_OF_OVMS}temperature out of range"),
        ("error: out of range", f"{_OF_OVMS}error: out of range"),
    ],
)
def test_error_begins_with_the_field(error: object, said: str) -> None:
    """As docs/services.md promises, if the server's error names the field."""
    refusal = complaint_error(Complaint.of_body(400, json.dumps({"error": error}).encode()))
    assert isinstance(refusal, InvalidRequestError)
    assert refusal.message == said
