"""Which plugin a command is about: the one that was named, the nearest plugin.yaml, or one of this package."""

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

__all__ = ["chosen_manifest", "chosen_manifest_file", "package_places", "packaged_plugin", "packaged_plugins"]


def packaged_plugin(name: str) -> Path | None:
    """The directory of a plugin that comes with this package, by its name."""
    if name == _default_name():
        return _bundled().parent
    found = (place / "plugins" / name for place in package_places() if re.fullmatch(r"\w+", name))
    return next((place for place in found if (place / "plugin.yaml").is_file()), None)


def packaged_plugins() -> list[str]:
    """The names that --plugin takes for the plugins that come with this package."""
    beside = {file.parent.name for place in package_places() for file in place.glob("plugins/*/plugin.yaml")}
    return sorted({*filter(None, [_default_name()]), *beside})


def _default_name() -> str:
    """The name of the plugin that is taken when none is chosen, which is its engine's; "" when there is none."""
    from engine_plugin.manifest import load_manifest

    try:
        return load_manifest(_bundled()).engine_name
    except (ManifestError, NotFoundError):
        return ""


def chosen_manifest(options: Options) -> Manifest:
    """The manifest that --plugin, the environment, the working directory or this package gives, in this order.

    Raises NotFoundError when a directory that was named holds none, ManifestError when it is wrong, PreconditionError
    for a data directory that cannot be trusted.
    """
    from engine_plugin.manifest import load_manifest
    from engine_plugin.system.trust import require_data_dir

    manifest = load_manifest(chosen_manifest_file(options))
    require_data_dir(manifest.data_dir)
    return manifest


def chosen_manifest_file(options: Options) -> Path:
    """The file that `chosen_manifest` reads."""
    from engine_plugin.manifest import find_manifest, manifest_file

    named = options.plugin or _in_the_environment()
    if named is not None:
        file = manifest_file(named.absolute())
        if file is None:
            said = "--plugin" if options.plugin else PLUGIN_DIR
            raise NotFoundError(
                f"there is no plugin.yaml in {named}. Name a plugin's directory with {said}, or one of those that "
                f"come with this package: {', '.join(packaged_plugins())}."
            )
        return file
    try:
        return find_manifest([Path.cwd()], passed_over=lambda text: _note(options, text))
    except (ManifestError, OSError):
        return _bundled()


def _note(options: Options, text: str) -> None:
    """Say something about the choice of the plugin on standard error, once, and not to a shell that completes."""
    if text not in options.noted and COMPLETE not in os.environ:
        say(text)
    options.noted.add(text)


def _in_the_environment() -> Path | None:
    named = os.environ.get(PLUGIN_DIR, "")
    if not named or Path(named).exists():
        return Path(named) if named else None
    return packaged_plugin(named) or Path(named)


def package_places() -> tuple[Path, Path]:
    """Where plugins may lie that come with us: a wheel carries them in the package, a checkout beside it."""
    import engine_plugin

    package = Path(engine_plugin.__file__).parent
    return package, package.parent


def _bundled() -> Path:
    for place in package_places():
        if (place / "plugin.yaml").is_file():
            return place / "plugin.yaml"
    raise NotFoundError(
        f"no plugin.yaml here or above, and none came with this package. Use --plugin DIR or {PLUGIN_DIR}."
    )
