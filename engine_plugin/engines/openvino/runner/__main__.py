"""The embedded server's entry: `python -m engine_plugin.engines.openvino.runner VERB`.

    serve     the HTTP server; settings are one JSON line on stdin, which then stays open: its end means that the
              plugin is gone or wants us to stop
    probe     print version and devices as JSON

Apart from the guard it imports nothing of ours but this package. A failure is one line on stderr and exit status 3.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from engine_plugin.engines.processes import guard

__all__ = ["main"]

FAILED = 3


def _fail(text: str) -> None:
    sys.stderr.write(f"E {text}\n")
    sys.stderr.flush()
    os._exit(FAILED)


def _settings() -> dict[str, Any]:
    """The first line of stdin, read without a buffer, so that the lifeline's thread sees all that follows."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(0, 65536)
        if not data:
            os._exit(0)
        line += data
    settings: dict[str, Any] = json.loads(line)
    return settings


def _serve() -> None:
    settings = _settings()
    from engine_plugin.engines.openvino.runner.serving import serve

    serve(settings)


def _probe() -> None:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # so that importing it fails: it phones home
    import openvino
    import openvino_genai

    core = openvino.Core()
    devices = [
        {"name": name, "description": str(core.get_property(name, "FULL_DEVICE_NAME"))}
        for name in core.available_devices
    ]
    print(json.dumps({"version": openvino_genai.__version__, "devices": devices}))


def main(arguments: list[str]) -> int:
    """Run one verb; `serve` does not return."""
    verbs = {"serve": _serve, "probe": _probe}
    if len(arguments) != 1 or arguments[0] not in verbs:
        sys.stderr.write(f"usage: runner {'|'.join(verbs)}\n")
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the plugin
    guard.arm()
    try:
        verbs[arguments[0]]()
    except ImportError as error:
        _fail(f"{error}. Install the engine: InstallEngine, or pip install 'engine-plugin[openvino]'")
    except OSError as error:
        _fail(str(error))
    except (ValueError, KeyError) as error:
        _fail(f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
