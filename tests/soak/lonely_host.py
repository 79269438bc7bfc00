"""A host for the soak to kill: `python -m tests.soak.lonely_host FOLDER MARK ENVIRONMENT`.

Launches the plugin in that folder, opens endless streams, prints a line, and waits.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

from tests.soak.ollama_load import ask_for
from tests.soak.rig import Log, launched

__all__ = ["main"]

_STREAMS = 4


async def main(folder: Path, mark: str, environ: dict[str, str]) -> None:
    """Run until killed."""
    async with await launched(folder, mark, Log(re.compile("")), **environ) as client:
        await client.start_engine()
        streams = [client.stream("chat", ask_for("chat", "fault-endless", "count 9")) for _ in range(_STREAMS)]
        chunks = [aiter(stream) for stream in streams]
        for each in chunks:
            await anext(each)
        print("up", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))
