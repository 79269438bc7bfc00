"""The choice of the plugin: a named one, the nearest plugin.yaml, or a bundled one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import PLUGIN_DIR
from engine_plugin.cli.context import COMPLETE
from engine_plugin.cli.output import say
from engine_plugin.errors import ManifestError, NotFoundError

if TYPE_CHECKING:
    from engine_plugin.cli.context import Options
    from engine_plugin.manifest import Manifest

__all__ = ["bundled_plugins", "chosen_manifest", "chosen_manifest_file"]


def bundled_plugins() -> dict[str, Path]:
    """Return the directories of the bundled plugins by the names that --plugin takes, sorted.

    The default plugin has the name of its engine.
    """
    from engine_plugin.manifest import load_manifest

    files = [file for place in reversed(_package_places()) for file in place.glob("plugins/*/plugin.yaml")]
    found = {file.parent.name: file.parent for file in files}
    with suppress(ManifestError, NotFoundError):
        default = _default_file()
        found[load_manifest(default).engine_name] = default.parent
    return dict(sorted(found.items()))


def chosen_manifest(options: Options) -> Manifest:
    """Load the manifest chosen by --plugin, the environment, the working directory or this package, in this order.

    Raises NotFoundError if a named directory has no plugin.yaml, ManifestError if the file is invalid, and
    PreconditionError if the data directory cannot be trusted.
    """
    from engine_plugin.manifest import load_manifest
    from engine_plugin.system.trust import require_data_dir

    if options.manifest is None:
        manifest = load_manifest(chosen_manifest_file(options))
        require_data_dir(manifest.data_dir)
        options.manifest = manifest
    return options.manifest


def chosen_manifest_file(options: Options) -> Path:
    """Return the file that `chosen_manifest` reads. Raises NotFoundError."""
    from engine_plugin.manifest import find_manifest, manifest_file

    named = options.plugin or _in_the_environment()
    if named is not None:
        file = manifest_file(named.absolute())
        if file is None:
            setting = "--plugin" if options.plugin else PLUGIN_DIR
            raise NotFoundError(
                f"there is no plugin.yaml in {named}. Set {setting} to a plugin's directory or a bundled plugin: "
                f"{', '.join(bundled_plugins())}"
            )
        return file
    try:
        return find_manifest([Path.cwd()], passed_over=_note)
    except (ManifestError, OSError):
        return _default_file()


def _note(text: str) -> None:
    """Print a note about the choice of the plugin to standard error, but not during completion."""
    if COMPLETE not in os.environ:
        say(text)


def _in_the_environment() -> Path | None:
    named = os.environ.get(PLUGIN_DIR, "")
    if not named or Path(named).exists():
        return Path(named) if named else None
    return bundled_plugins().get(named, Path(named))


def _package_places() -> tuple[Path, Path]:
    """Return the directories of bundled plugins: a wheel has them in the package, a checkout beside it."""
    import engine_plugin

    package = Path(engine_plugin.__file__).parent
    return package, package.parent


def _default_file() -> Path:
    for place in _package_places():
        if (place / "plugin.yaml").is_file():
            return place / "plugin.yaml"
    raise NotFoundError(
        f"no plugin.yaml in or above the working directory or in this package. Use --plugin DIR or {PLUGIN_DIR}"
    )
