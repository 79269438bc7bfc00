"""How many examples hypothesis makes up for a test: its one profile, which conftest.py loads.

Each run has the same examples, so that no change fails by chance. `EXAMPLES` says how many (`make test-all` sets it);
`ABUSE=5000` takes as many at random instead.
No example has a deadline and no health check watches the time that making one takes: both would test the machine.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

__all__ = ["FEW", "MORE", "load_profile"]

MORE = int(os.environ.get("ABUSE", "0"))
"""So many random examples in each test; 0: the usual ones."""

USUAL = int(os.environ.get("EXAMPLES", "50"))

SUITE = settings(
    max_examples=MORE or USUAL,
    derandomize=not MORE,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,  # examples of a test share its directory and its plugin on purpose
    ],
)
FEW = settings(SUITE, max_examples=MORE or USUAL // 4)
"""For tests whose examples cost milliseconds each: a call to a plugin, a start."""


def load_profile() -> None:
    """Make SUITE the profile of all tests that name no other."""
    settings.register_profile("suite", SUITE)
    settings.load_profile("suite")
