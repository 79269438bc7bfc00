"""plugin.yaml → Manifest: validated, variables expanded, every complaint with file, line and a fix.

    document.py    the text → plain data in which every key knows its line
    sections.py    typed reading of one mapping, with a complaint for whatever is wrong in it
    variables.py   ${AOG_DATA_DIR}, ${DATA_DIR}, ${PLUGIN_DIR}, ${HOME}
    schema.py      what a manifest may hold: the data → Manifest
    model.py       the Manifest itself
    paths.py       questions about the file system that never raise
    load.py        finding, loading, inspecting and linting the file

This package is on the way to the handshake: beyond the standard library it imports PyYAML and nothing else.
"""

from engine_plugin.manifest.load import (
    MANIFEST_NAMES,
    find_manifest,
    inspect_manifest,
    lint,
    load_manifest,
    manifest_file,
)
from engine_plugin.manifest.model import (
    PLATFORM_KEYS,
    SERVICE_NAMES,
    Capabilities,
    Manifest,
    Platform,
    Provider,
    ServiceSpec,
    platform_key,
)

__all__ = [
    "MANIFEST_NAMES",
    "PLATFORM_KEYS",
    "SERVICE_NAMES",
    "Capabilities",
    "Manifest",
    "Platform",
    "Provider",
    "ServiceSpec",
    "find_manifest",
    "inspect_manifest",
    "lint",
    "load_manifest",
    "manifest_file",
    "platform_key",
]
