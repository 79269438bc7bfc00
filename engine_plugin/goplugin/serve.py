"""The entry of a hosted plugin. What is slow or may print is imported only once we know that a host is there.

Without a host there is no handshake: to try, test or debug the plugin, serve it by hand (`engine-plugin serve`)
and point the host at that address; go-plugin calls this reattaching.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from engine_plugin.goplugin.handshake import RUN_BY_HAND, HostEnv, is_hosted

if TYPE_CHECKING:
    from engine_plugin.goplugin.plugin import Load
    from engine_plugin.goplugin.watchdog import LastResort

__all__ = ["run"]

_FLUSH_LIMIT = 0.1  # seconds for the last log lines


def run(load: Load) -> int:
    """Be a host's plugin until the host has had enough; the exit status. Called by the CLI, in the main thread.

    `load` makes the plugin. Its errors are logged, EnginePluginError by message alone, and end the process with 1
    and without a handshake; so do an environment that we cannot serve and a run by hand.
    """
    if not is_hosted(os.environ):
        sys.stderr.write(RUN_BY_HAND)
        return 1
    parent = os.getppid()
    _ignore_interrupts()

    import logging

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.goplugin.hclog import install_hclog
    from engine_plugin.goplugin.watchdog import LastResort

    log_lines = install_hclog(os.environ)
    last_resort = LastResort(flush=lambda: log_lines.drain(_FLUSH_LIMIT))
    log = logging.getLogger(__name__)
    try:
        _run_session(load, parent, last_resort)
    except EnginePluginError as error:
        log.error("%s", error)
    except Exception:
        log.exception("the plugin crashed")
    else:
        return 0
    finally:
        log_lines.drain(_FLUSH_LIMIT)
    return 1


def _run_session(load: Load, parent: int, last_resort: LastResort) -> None:
    from engine_plugin.goplugin.stdout import StandardOutput

    stdout = StandardOutput()
    try:
        host = HostEnv.from_environ(os.environ)
        from engine_plugin.goplugin.session import Session
        from engine_plugin.system.limits import raise_file_limit
        from engine_plugin.waiting import run_to_the_end

        raise_file_limit()

        async def main() -> None:
            await Session(host, stdout, last_resort).run(load, parent)

        run_to_the_end(main())
    finally:
        stdout.close()


def _ignore_interrupts() -> None:
    """Leave Ctrl-C in the host's terminal to the host, which stops us in its own way."""
    import signal

    # A handler and not SIG_IGN: the engine's process would inherit that.
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
