"""Plugin directories, as a host finds them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from engine_plugin.manifest import platform_key

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST = """\
version: "1.0"
provider:
  name: {name}
  display_name: Fake
  version: 1.2.3
  type: local
services:
  - service_name: chat
    task_type: text-generation
    protocol: HTTP
    expose_protocol: HTTP
    endpoint: /v1/chat/completions
    default_model: tiny
    config_ref: openai:chat
    timeout: 60
    capabilities:
      support_streaming: true
      support_bidirectional: false
platforms:
  {platform}:
    executable: {executable}
engine:
  name: fake
resources:
  data_dir: "${{PLUGIN_DIR}}/data"
"""


def make_plugin(plugins: Path, name: str, *, program: Path | None = None, directory: str = "") -> Path:
    """Make a plugin's directory with its manifest and an executable that runs `program` (none without it)."""
    place = plugins / (directory or name)
    executable = f"bin/{platform_key()}/plugin" + (".cmd" if sys.platform == "win32" else "")
    (place / executable).parent.mkdir(parents=True)
    (place / "plugin.yaml").write_text(MANIFEST.format(name=name, platform=platform_key(), executable=executable))
    if program is not None:
        write_launcher(place / executable, program)
    return place


def write_launcher(path: Path, program: Path) -> None:
    """Write an executable that replaces itself by `program` under this Python."""
    if sys.platform == "win32":
        path.write_text(f'@"{sys.executable}" "{program}"\n')
    else:
        path.write_text(
            f"#!{sys.executable}\n"
            "import os, sys\n"
            f"os.execv(sys.executable, [sys.executable, {json.dumps(str(program))}])\n"
        )
        path.chmod(0o755)
