"""How many examples a test takes, and what random JSON looks like."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

__all__ = ["JSON", "MORE", "ODD_TEXT", "examples"]

MORE = int(os.environ.get("ABUSE", "0"))
"""So many random examples in each test; 0: a few that are always the same."""


def examples(count: int) -> settings:
    """So many examples without a deadline; a failing one is printed."""
    return settings(
        max_examples=MORE or count,
        derandomize=not MORE,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


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
