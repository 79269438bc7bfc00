"""A pull in a process of its own: prints one JSON line an event, then its outcome.

python -m tests.models.child ROOT URL NAME [largest file in bytes]
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from engine_plugin.download.events import progress_json
from engine_plugin.errors import EnginePluginError
from engine_plugin.models.store import FetchPolicy, ModelStore, PullRequest
from tests.models.fakes import Inspector


def say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def main(root: str, url: str, name: str, largest: str = "") -> None:
    if largest:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest), resource.RLIM_INFINITY))
    store = ModelStore(Path(root), inspect=Inspector(), policy=FetchPolicy(attempts=2, backoff_s=0.01))
    try:
        async for event in store.pull(PullRequest(name, source=url)):
            say(json.loads(progress_json(event)))
    except EnginePluginError as error:
        say({"status": "failed", "code": error.code, "message": error.message})
    finally:
        await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
