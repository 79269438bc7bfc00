"""The embedded server's command line; `_USAGE` describes it. A failure is one line on stderr and exit status 3."""

from __future__ import annotations

import json
import signal
import sys

from engine_plugin.process import guard
from engine_plugin.process.entry import fail, own_stdin, read_settings
from openvino_server.trimming import trim_openvino

__all__ = ["main"]

_USAGE = """\
usage: python -m openvino_server serve|probe

serve    read the settings from stdin, one JSON object on one line, print {"address": …}, and serve until stdin ends
probe    print {"version": …, "devices": […]} of the installed openvino-genai

docs/openvino-server.md has the settings, config.json and the routes. To serve until Ctrl-C:

    (echo '{"host": "127.0.0.1", "port": 8000, "key": "secret", "config": "config.json"}'; cat) |
        python -m openvino_server serve
"""


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
    """Run one verb and return the exit status; `serve` does not return."""
    verbs = {"serve": _serve, "probe": _probe}
    if arguments in (["--help"], ["-h"]):
        sys.stdout.write(_USAGE)
        return 0
    if len(arguments) != 1 or arguments[0] not in verbs:
        sys.stderr.write(_USAGE)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the plugin
    guard.arm()
    try:
        verbs[arguments[0]]()
    except ImportError as error:
        fail(f"{error}. Install the engine: InstallEngine, or pip install 'engine-plugin[openvino]'")
    except OSError as error:
        fail(str(error))
    except (ValueError, TypeError) as error:
        fail(f"stdin: not valid settings: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
