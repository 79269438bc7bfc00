"""Discovers the plugins of a directory and launches them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from engine_plugin.errors import NotFoundError, Problem
from engine_plugin.host.launch import launch
from engine_plugin.manifest import inspect_manifest, manifest_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from engine_plugin.host.client import PluginClient
    from engine_plugin.host.launch import LaunchOptions
    from engine_plugin.manifest import Manifest

__all__ = ["PluginRegistry"]


class PluginRegistry:
    """The plugins of a directory, by name. Created by `discover`.

    `problems` has every problem of a manifest; a plugin with a problem of severity "error" is left out.
    """

    def __init__(self, directory: Path, manifests: Mapping[str, Manifest], problems: tuple[Problem, ...]) -> None:
        self.directory = directory
        self.problems = problems
        self._manifests = dict(manifests)

    @classmethod
    def discover(cls, directory: Path) -> PluginRegistry:
        """Read `<directory>/*/plugin.yaml` (else plugin.json). Raises NotFoundError if the directory does not exist.

        As in AOG, a second plugin of the same name is skipped, and a plugin's directory must have the plugin's name.
        """
        if not directory.is_dir():
            raise NotFoundError(f"{directory}: no such directory. Create it, with one directory for each plugin")
        manifests: dict[str, Manifest] = {}
        problems: list[Problem] = []
        for entry in sorted(directory.iterdir()):
            file = manifest_file(entry)
            manifest = _read(file, problems) if file else None
            if manifest is None:
                continue
            complaint = _complaint(manifest, manifests)
            if complaint is None:
                manifests[manifest.provider.name] = manifest
            else:
                problems.append(complaint)
        return cls(directory, manifests, tuple(problems))

    @property
    def names(self) -> list[str]:
        """The plugins' names, sorted."""
        return sorted(self._manifests)

    def manifest(self, name: str) -> Manifest:
        """Return a plugin's manifest. Raises NotFoundError with the names of the existing plugins."""
        try:
            return self._manifests[name]
        except KeyError:
            known = ", ".join(self.names) or "none"
            raise NotFoundError(f"no plugin is called {name!r} in {self.directory}; found: {known}") from None

    __getitem__ = manifest

    def __contains__(self, name: object) -> bool:
        return name in self._manifests

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._manifests)

    async def launch(self, name: str, **options: Unpack[LaunchOptions]) -> PluginClient:
        """Start a plugin as AOG does: its executable for this platform, no arguments, cwd = `<plugin>/bin`.

        `options` are `env`, `start_timeout`, `on_log` and `auto_mtls`, as for `launch`. Raises NotFoundError,
        ManifestError (no executable for this platform) and what `launch` raises.
        """
        executable = self.manifest(name).executable()
        return await launch([str(executable)], name=name, cwd=executable.parent.parent, **options)


def _read(file: Path, problems: list[Problem]) -> Manifest | None:
    manifest, found = inspect_manifest(file)
    problems += found
    return manifest if not any(problem.severity == "error" for problem in found) else None


def _complaint(manifest: Manifest, known: Mapping[str, Manifest]) -> Problem | None:
    name = manifest.provider.name
    where = ("provider", "name")
    if name in known:
        what = f"the plugin name {name!r} is already used by {known[name].path}"
        return manifest.problem(where, what, "Change provider.name of one of them; this plugin is skipped")
    if manifest.plugin_dir.name != name:
        what = f"provider.name is {name!r}, but the directory is {manifest.plugin_dir.name!r}"
        return manifest.problem(where, what, f"Rename the directory to {name!r}, or change provider.name")
    return None
