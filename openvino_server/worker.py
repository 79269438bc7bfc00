"""One loaded model: `python -m openvino_server.worker`, spawned by the server process.

It is a process of its own because a step of a language model holds Python's lock: in the server process, all HTTP
requests would wait for it. Requests come as frames on stdin, whose end means that the server process has ended;
answers leave on what was stdout, and the output of libraries goes to stderr.
"""

from __future__ import annotations

import os
import sys
import traceback

from openvino_server.frames import incoming, own_pipes

__all__ = ["main"]

FAILED = 3

_SWITCH = 0.0005  # seconds after which a thread that waits for Python gets it: a request must not wait for 5 ms


def main() -> int:
    """Load the model of the first frame, answer ready or failed, and serve until the frame `quit`."""
    stdin, channel = own_pipes()
    sys.setswitchinterval(_SWITCH)
    inbox = incoming(stdin)
    verb, *rest = inbox.get()
    if verb != "load":
        return 0
    from openvino_server import pipelines

    try:
        server = pipelines.load(rest[0])
    except Exception as error:  # noqa: BLE001  # the answer has the reason
        channel.send(("failed", pipelines.reason(error), isinstance(error, MemoryError)))
        return FAILED
    channel.send(("ready", server.facts))
    server.serve(inbox, channel)
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:  # noqa: BLE001  # reported, and the status says so
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # an exit would wait for busy threads, and the destructors of pipelines for what is running
