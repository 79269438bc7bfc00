"""What a pull tells, in its four kinds, and the form that each has on the wire."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from engine_plugin.download.events import ChunkProgress, Error, PullEvent, StepStarted, Success, progress_json

DIGEST = f"sha256:{'ab' * 32}"

SHAPES: list[tuple[PullEvent, dict[str, Any]]] = [
    (StepStarted("verifying sha256"), {"status": "verifying sha256"}),
    (
        ChunkProgress(DIGEST, 5, 10),
        {"status": "downloading", "digest": DIGEST, "completed": 5, "total": 10},
    ),
    (
        Success("tiny", 10, DIGEST),
        {"status": "success", "digest": DIGEST, "completed": 10, "total": 10, "model": "tiny"},
    ),
    (Error("the disk is full", 500), {"status": "error: the disk is full"}),
]


@pytest.mark.parametrize(("event", "shape"), SHAPES, ids=lambda value: type(value).__name__)
def test_each_event_on_the_wire(event: PullEvent, shape: dict[str, Any]) -> None:
    assert json.loads(progress_json(event)) == shape


def test_there_are_four_kinds() -> None:
    assert {type(event) for event, _ in SHAPES} == set(get_args(PullEvent))
    ends = [event for event, shape in SHAPES if shape["status"] == "success" or shape["status"].startswith("error")]
    assert [type(event) for event in ends] == [Success, Error], "a reader knows by the status that nothing follows"
