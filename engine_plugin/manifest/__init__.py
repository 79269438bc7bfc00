"""plugin.yaml → Manifest: validated, with variables expanded; each problem has file, line and fix.

    document.py    the text → plain data with the line of every key
    sections.py    typed reading of one mapping, with a problem for each invalid value
    variables.py   ${AOG_DATA_DIR}, ${DATA_DIR}, ${PLUGIN_DIR}, ${HOME}
    schema.py      the schema: the data → Manifest
    model.py       the Manifest itself
    paths.py       file system queries that never raise
    load.py        finds, loads, inspects and lints the file

A plugin imports this package before its handshake, so it imports only PyYAML and the standard library.
"""

from engine_plugin.manifest.document import write_parsed
from engine_plugin.manifest.load import find_manifest, inspect_manifest, lint, load_manifest, manifest_file
from engine_plugin.manifest.model import (
    PLATFORM_KEYS,
    SERVICE_NAMES,
    Manifest,
    ServiceCapabilities,
    ServiceSpec,
    platform_key,
)

__all__ = [
    "PLATFORM_KEYS",
    "SERVICE_NAMES",
    "Manifest",
    "ServiceCapabilities",
    "ServiceSpec",
    "find_manifest",
    "inspect_manifest",
    "lint",
    "load_manifest",
    "manifest_file",
    "platform_key",
    "write_parsed",
]
