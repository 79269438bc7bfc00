"""Ask a plugin's chat service a question and print the answer as it comes.

python examples/chat.py PLUGINS_DIR PLUGIN_NAME PROMPT
"""

import asyncio
import sys
from pathlib import Path

from engine_plugin.errors import EnginePluginError
from engine_plugin.host import PluginRegistry, events


async def main(plugins: str, name: str, prompt: str) -> None:
    registry = PluginRegistry.discover(Path(plugins))
    async with await registry.launch(name) as plugin:
        await plugin.start_engine()
        request = {"messages": [{"role": "user", "content": prompt}]}
        async with plugin.stream("chat", request) as chunks:
            async for event in events(chunks):
                for choice in event.get("choices", []):
                    print(choice["delta"].get("content") or "", end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except EnginePluginError as error:
        sys.exit(f"chat: {error}")
