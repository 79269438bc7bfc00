"""What every test may count on."""

from __future__ import annotations

import signal

# A shell, nohup or a service manager may start us with some signals ignored, and our children would inherit that.
for _name in ("SIGINT", "SIGQUIT", "SIGHUP"):
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)
