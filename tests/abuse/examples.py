"""What random JSON looks like."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

__all__ = ["JSON", "ODD_TEXT"]

ODD_TEXT = st.text(max_size=30) | st.sampled_from(
    ["\0", "\ud800", "\udfff", "\ufeff", "\u202e", "e\u0301", "\U0010ffff", "\r\n", "${HOME}", "../..", "x" * 5000]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**53 + 1, -(2**63), 10**400, 1e308, -0.0, float("inf"), float("nan")])
    | st.floats()
    | ODD_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ODD_TEXT, inner, max_size=4),
    max_leaves=20,
)
"""What `json.dumps` writes; NaN and Infinity among it, which are no JSON."""
