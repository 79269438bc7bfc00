"""The choice of the plugin: a named one, the nearest plugin.yaml, or a bundled one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import PLUGIN_DIR
from engine_plugin.cli.context import COMPLETE
from engine_plugin.cli.output import say
from engine_plugin.errors import ManifestError, NotFoundError

if TYPE_CHECKING:
    from engine_plugin.cli.context import Options
    from engine_plugin.manifest import Manifest

__all__ = ["chosen_manifest", "chosen_manifest_file", "packaged_plugin", "packaged_plugins"]


def packaged_plugin(name: str) -> Path | None:
    """Return the directory of a bundled plugin, None if there is no such plugin."""
    if name == _default_name():
        return _bundled().parent
    found = (place / "plugins" / name for place in _package_places() if re.fullmatch(r"\w+", name))
    return next((place for place in found if (place / "plugin.yaml").is_file()), None)


def packaged_plugins() -> list[str]:
    """Return the names of the bundled plugins, as --plugin takes them."""
    beside = {file.parent.name for place in _package_places() for file in place.glob("plugins/*/plugin.yaml")}
    return sorted({*filter(None, [_default_name()]), *beside})


def _default_name() -> str:
    """Return the name of the default plugin, which is that of its engine; "" without a default plugin."""
    from engine_plugin.manifest import load_manifest

    try:
        return load_manifest(_bundled()).engine_name
    except (ManifestError, NotFoundError):
        return ""


def chosen_manifest(options: Options) -> Manifest:
    """Load the manifest chosen by --plugin, the environment, the working directory or this package, in this order.

    Raises NotFoundError if a named directory has no plugin.yaml, ManifestError if the file is invalid, and
    PreconditionError if the data directory cannot be trusted.
    """
    from engine_plugin.manifest import load_manifest
    from engine_plugin.system.trust import require_data_dir

    manifest = load_manifest(chosen_manifest_file(options))
    require_data_dir(manifest.data_dir)
    return manifest


def chosen_manifest_file(options: Options) -> Path:
    """Return the file that `chosen_manifest` reads. Raises NotFoundError."""
    from engine_plugin.manifest import find_manifest, manifest_file

    named = options.plugin or _in_the_environment()
    if named is not None:
        file = manifest_file(named.absolute())
        if file is None:
            said = "--plugin" if options.plugin else PLUGIN_DIR
            raise NotFoundError(
                f"there is no plugin.yaml in {named}. Set {said} to a plugin's directory or a bundled plugin: "
                f"{', '.join(packaged_plugins())}"
            )
        return file
    try:
        return find_manifest([Path.cwd()], passed_over=lambda text: _note(options, text))
    except (ManifestError, OSError):
        return _bundled()


def _note(options: Options, text: str) -> None:
    """Print a note about the choice of the plugin to standard error, once, and never during completion."""
    if text not in options.noted and COMPLETE not in os.environ:
        say(text)
    options.noted.add(text)


def _in_the_environment() -> Path | None:
    named = os.environ.get(PLUGIN_DIR, "")
    if not named or Path(named).exists():
        return Path(named) if named else None
    return packaged_plugin(named) or Path(named)


def _package_places() -> tuple[Path, Path]:
    """Return the directories of bundled plugins: a wheel has them in the package, a checkout beside it."""
    import engine_plugin

    package = Path(engine_plugin.__file__).parent
    return package, package.parent


def _bundled() -> Path:
    for place in _package_places():
        if (place / "plugin.yaml").is_file():
            return place / "plugin.yaml"
    raise NotFoundError(
        f"no plugin.yaml in or above the working directory or in this package. Use --plugin DIR or {PLUGIN_DIR}"
    )
