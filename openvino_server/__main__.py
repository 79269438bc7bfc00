"""The embedded server's entry: `python -m openvino_server VERB`.

    serve     the HTTP server; settings are one JSON line on stdin, which then stays open: its end means that the
              plugin is gone or wants us to stop
    probe     print version and devices as JSON

Of ours it imports this package, and the guard and its like. A failure is one line on stderr and exit status 3.
"""

from __future__ import annotations

import json
import signal
import sys

from engine_plugin.process import guard
from engine_plugin.process.entry import fail, own_stdin, read_settings
from openvino_server.trimming import trim_openvino

__all__ = ["main"]


def _serve() -> None:
    stdin = own_stdin()
    settings = read_settings(stdin)
    from openvino_server.serving import serve

    serve(settings, stdin)


def _probe() -> None:
    trim_openvino()
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
        fail(f"{error}. Install the engine: InstallEngine, or pip install 'engine-plugin[openvino]'")
    except OSError as error:
        fail(str(error))
    except (ValueError, KeyError) as error:
        fail(f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
