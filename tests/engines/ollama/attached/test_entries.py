"""Any report of models is parsed; invalid fields are dropped and do not break a list."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.engines.ollama.entries import (
    EPOCH,
    listed_capabilities,
    listed_model,
    loaded_state,
    named_entries,
    shown_capabilities,
)
from engine_plugin.models.info import KINDS

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["0001-01-01T00:00:00Z", "2318-01-01T00:00:00.123456789+02:00", "12026-01-01T00:00:00Z"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ENTRY_FIELDS = (
    "name", "model", "digest", "size", "size_vram", "modified_at", "expires_at", "details", "capabilities",
    "context_length", "remote_host",
)  # fmt: skip
DETAILS = st.dictionaries(
    st.sampled_from(["family", "families", "format", "parameter_size", "context_length", "embedding_length"]), VALUES
)
ENTRIES = st.dictionaries(st.sampled_from(ENTRY_FIELDS), VALUES | DETAILS)


@given(st.fixed_dictionaries({"models": VALUES | st.lists(ENTRIES | VALUES, max_size=4)}) | DETAILS)
def test_any_list_is_parsed(answer: dict[str, Any]) -> None:
    for entry in named_entries(answer):
        model = listed_model(entry, listed_capabilities(entry))
        assert model.name
        assert model.kind in KINDS
        assert model.modified_at.tzinfo is not None
        assert model.size >= 0
        loaded = loaded_state(entry)
        assert loaded.expires_at is None or loaded.expires_at > EPOCH
        json.dumps([model.details.to_wire(), loaded.to_wire()])


@given(st.dictionaries(st.sampled_from(["capabilities", "model_info", "details"]), VALUES))
def test_any_show_is_parsed(answer: dict[str, Any]) -> None:
    capabilities = shown_capabilities(answer)
    assert capabilities.context_length >= 0
    assert all(isinstance(feature, str) for feature in capabilities.features)
