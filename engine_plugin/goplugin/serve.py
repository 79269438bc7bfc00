"""The entry point of a plugin under a host. Slow modules are imported only once a host is known to be there.

Without a host there is no handshake. To debug the plugin, serve it by hand (`engine-plugin serve`) and point the
host at that address; go-plugin calls this reattaching.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from engine_plugin.goplugin.handshake import RUN_BY_HAND, HostEnv, is_hosted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeAlias

    from engine_plugin.goplugin.early import EarlyListener
    from engine_plugin.goplugin.watchdog import LastResort
    from engine_plugin.protocol.handshake import Cookie
    from engine_plugin.server.seam import HostedPlugin

    Load: TypeAlias = Callable[[], Awaitable[HostedPlugin]]

__all__ = ["run"]

_FLUSH_LIMIT = 0.1  # seconds to write the last log lines


def run(load: Load, cookie: Cookie, early: EarlyListener | None = None) -> int:
    """Serve a host until it ends the plugin; returns the exit status. Called by `app.main` in the main thread.

    `cookie` is the one that hosts of this kind of plugin set. `load` builds the plugin. Its errors are logged,
    EnginePluginError without a traceback, and end the process with 1 and without a handshake, as do an invalid
    environment and a run by hand. `early` is where the plugin listens if its handshake line is printed already; a
    host that connects meanwhile waits for `load`, or sees the connection end when the caller closes `early`.
    """
    if not is_hosted(os.environ, cookie):
        sys.stderr.write(RUN_BY_HAND)
        return 1
    parent = os.getppid() if early is None else early.parent
    _ignore_interrupts()
    if early is not None:
        _leave_on_signals()

    import logging

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.goplugin.hclog import install_hclog
    from engine_plugin.goplugin.watchdog import LastResort

    log_lines = install_hclog(os.environ)
    last_resort = LastResort(flush=lambda: log_lines.drain(_FLUSH_LIMIT))
    log = logging.getLogger(__name__)
    try:
        _run_session(load, parent, last_resort, early)
    except EnginePluginError as error:
        log.error("%s", error)
    except Exception:
        log.exception("the plugin crashed")
    else:
        return 0
    finally:
        log_lines.drain(_FLUSH_LIMIT)
    return 1


def _run_session(load: Load, parent: int, last_resort: LastResort, early: EarlyListener | None) -> None:
    from engine_plugin.goplugin.stdout import StandardOutput

    stdout = StandardOutput(early.output if early is not None else None)
    try:
        host = HostEnv.from_environ(os.environ)
        from engine_plugin.goplugin.session import Session
        from engine_plugin.system.limits import raise_file_limit
        from engine_plugin.waiting import run_to_the_end

        raise_file_limit()

        async def main() -> None:
            await Session(host, stdout, last_resort, early).run(load, parent)

        run_to_the_end(main())
    finally:
        stdout.close()


def _ignore_interrupts() -> None:
    """Ignore Ctrl-C in the host's terminal: the host stops its plugins itself."""
    import signal

    # A handler and not SIG_IGN: the engine's process would inherit that.
    signal.signal(signal.SIGINT, lambda _number, _frame: None)


def _leave_on_signals() -> None:
    """Exit in order if the host ends the plugin before the session handles that."""
    import signal

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: sys.exit(0))
