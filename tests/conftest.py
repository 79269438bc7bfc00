"""What every test may count on."""

from __future__ import annotations

import signal

# A shell starts what runs in its background with SIGINT ignored, and our children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
