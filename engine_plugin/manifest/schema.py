"""The schema of plugin.yaml: plain data → Manifest, or all problems.

A value that the host (AOG) would reject or misread is an error; a value that it accepts but handles badly is a
warning.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from engine_plugin.manifest.document import INVALID, read_document
from engine_plugin.manifest.model import (
    PLATFORM_KEYS,
    SERVICE_NAMES,
    Manifest,
    Platform,
    Provider,
    ServiceCapabilities,
    ServiceSpec,
)
from engine_plugin.manifest.paths import absolute
from engine_plugin.manifest.sections import Section, did_you_mean, quoted
from engine_plugin.manifest.variables import VariableError, Variables
from engine_plugin.system.names import is_device_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.errors import Problem
    from engine_plugin.manifest.document import KeyPath

__all__ = ["read_manifest"]

_TOP_KEYS = ("version", "provider", "services", "platforms", "resources", "engine", "auto_pull")
_HOSTS_OWN_KEYS = ("executable", "models_dir", "download_dir")  # of resources.ollama; AOG decodes them itself

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CONFIG_REF = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*:[A-Za-z0-9][A-Za-z0-9._-]*")

# The conversions of AOG 0.7.7 (internal/provider/template). If a flavor lacks the service, AOG skips the plugin;
# for an unknown flavor it panics (schedule.GetFlavorDef).
_AOG_FLAVORS: dict[str, tuple[str, ...]] = {
    "aliyun": ("chat", "embed", "text-to-image", "speech-to-text", "speech-to-text-ws", "text-to-speech"),
    "aog": SERVICE_NAMES,
    "baidu": ("chat", "embed", "text-to-image", "text-to-speech"),
    "deepseek": ("chat",),
    "ollama": ("chat", "generate", "embed"),
    "openai": ("chat",),
    "openvino": SERVICE_NAMES,
    "tencent": ("chat", "embed", "text-to-image", "text-to-speech"),
}


def read_manifest(
    path: Path, environ: Mapping[str, str], parsed: Path | None = None
) -> tuple[Manifest | None, list[Problem]]:
    """Read and validate a file. The manifest is None if any problem is an error. Never raises.

    `parsed` is as for `read_document`.
    """
    path = absolute(path)
    source, data, problems = read_document(path, parsed)
    if data is INVALID:
        return None, problems
    top = Section(source, problems, (), data, _TOP_KEYS)
    version = top.text("version", required=True)
    if version and version != "1.0":
        top.complain(("version",), f"is {quoted(version)}", 'Write version: "1.0", the only supported version')
    provider = _provider(top)
    services = _services(top)
    platforms = _platforms(top)
    variables = Variables(path.parent, environ)
    data_dir, resources = _resources(top, provider, variables)
    engine_name, engine_options = _engine(top, provider, variables)
    auto_pull = top.flag("auto_pull")
    if variables.ignored_data_dir:
        given = quoted(variables.ignored_data_dir)
        what = f"uses the default of ${{AOG_DATA_DIR}}, because the environment's value {given} is relative"
        fix = "Set AOG_DATA_DIR in the environment to an absolute path, or unset it"
        top.complain(("resources", "data_dir"), what, fix, "warning")
    if any(problem.severity == "error" for problem in problems):
        return None, problems
    manifest = Manifest(
        path=path,
        plugin_dir=path.parent,
        version=version,
        provider=provider,
        services=MappingProxyType(services),
        platforms=MappingProxyType(platforms),
        data_dir=data_dir,
        engine_name=engine_name,
        engine_options=MappingProxyType(engine_options),
        resources=MappingProxyType(resources),
        source=source,
        auto_pull=auto_pull,
    )
    return manifest, problems


def _provider(top: Section) -> Provider:
    section = top.section("provider", _keys(Provider), required=True)
    if not section.data:  # report a missing section once
        return Provider("", "", "", "", "", "", "", "")
    name = section.text("name", required=True)
    if name and not _NAME.fullmatch(name):
        fix = "Begin with a letter or digit, then up to 63 letters, digits, dots, dashes and underscores"
        section.complain(("name",), f"is {quoted(name)}, which cannot name the plugin's directory", fix)
    elif name.endswith(".") or is_device_name(name):
        what = f"is {quoted(name)}, which Windows does not accept as the name of a directory"
        section.complain(("name",), what, "Choose another name")
    return Provider(
        name=name,
        version=section.text("version", required=True),
        type=section.choice("type", ("local", "remote"), required=True),
        **{key: section.text(key) for key in ("display_name", "author", "description", "homepage", "engine_host")},
    )


def _keys(shape: type[Provider | ServiceSpec | ServiceCapabilities | Platform]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(shape))


def _services(top: Section) -> dict[str, ServiceSpec]:
    services: dict[str, ServiceSpec] = {}
    lines: dict[str, int] = {}
    sections = top.sections("services", (*_keys(ServiceSpec), "middlewares"))
    if top.data.get("services") in (None, []):
        top.complain(("services",), "declares no service", f"Declare at least one of: {', '.join(SERVICE_NAMES)}")
    for section in sections:
        spec = _service(section)
        name = spec.service_name
        if name in services:
            what = f"is {quoted(name)}, already declared in line {lines[name]}"
            section.complain(("service_name",), what, "Merge the two entries into one")
        elif name:
            services[name] = spec
            lines[name] = section.source.line((*section.path, "service_name"))
    return services


def _service(section: Section) -> ServiceSpec:
    section.texts("middlewares")  # AOG decodes this key but does not use it
    capabilities = section.section("capabilities", _keys(ServiceCapabilities))
    default_model = section.text("default_model")
    support_models = section.texts("support_models")
    if default_model and support_models and default_model not in support_models:
        what = f"is {quoted(default_model)}, which is not in support_models"
        section.complain(("default_model",), what, "Add it to support_models, or choose one of them", "warning")
    return ServiceSpec(
        service_name=section.choice("service_name", SERVICE_NAMES, required=True),
        expose_protocol=section.choice("expose_protocol", ("HTTP", "WEBSOCKET"), "HTTP"),
        auth_fields=section.texts("auth_fields"),
        default_model=default_model,
        support_models=support_models,
        config_ref=_config_ref(section),
        timeout=section.integer("timeout"),
        **{key: section.text(key) for key in ("task_type", "protocol", "endpoint", "auth_type")},
        capabilities=ServiceCapabilities(**{key: capabilities.flag(key) for key in _keys(ServiceCapabilities)}),
    )


def _config_ref(section: Section) -> str:
    value = section.text("config_ref")
    if not value:
        if isinstance(section.data.get("config_ref", ""), str | None):
            fix = "Add config_ref: flavor:service, such as openai:chat"
            section.complain(("config_ref",), "is missing: AOG skips a plugin without it", fix, "warning")
        return ""
    if not _CONFIG_REF.fullmatch(value):
        section.complain(("config_ref",), f"is {quoted(value)}", "Write it as flavor:service, such as openai:chat")
        return ""
    flavor, _, service = value.partition(":")
    offered = _AOG_FLAVORS.get(flavor)
    if offered is None:
        fix = f"Use one of its flavors: {', '.join(_AOG_FLAVORS)}"
        section.complain(("config_ref",), f"names {flavor}, which is not a flavor of AOG", fix, "warning")
    elif service not in offered:
        having = ", ".join(f"{name}:{service}" for name, services in _AOG_FLAVORS.items() if service in services)
        fix = f"Use {having}" if having else f"Use one of {', '.join(offered)} after the colon"
        what = f"names {service}, which AOG's flavor {flavor} lacks: AOG skips the whole plugin"
        section.complain(("config_ref",), what, fix, "warning")
    return value


def _platforms(top: Section) -> dict[str, Platform]:
    section = top.section("platforms")
    platforms: dict[str, Platform] = {}
    for key in section.data:
        if key not in PLATFORM_KEYS:
            fix = f"{did_you_mean(key, PLATFORM_KEYS)}Use one of: {', '.join(PLATFORM_KEYS)}"
            section.complain((key,), "is not a known platform", fix)
            continue
        entry = section.section(key, _keys(Platform), required=True)
        if not entry.data:
            continue
        executable = entry.text("executable", required=True)
        if executable and (wrong := _wrong_executable(key, executable)):
            entry.complain(("executable",), f"is {quoted(executable)}, {wrong[0]}", wrong[1])
        platforms[key] = Platform(executable, entry.texts("dependencies"))
    return platforms


def _wrong_executable(key: str, executable: str) -> tuple[str, str] | None:
    """Return what is wrong with a path, and the fix. The host joins it to the plugin's directory unchanged."""
    relative = "Write the path relative to the plugin's directory, such as bin/linux-amd64/plugin"
    if not key.startswith("windows_") and "\\" in executable:
        return "which contains a backslash", "Separate directories with /"
    windows = PureWindowsPath(executable)  # Windows has more forms of absolute paths; reject them everywhere
    if windows.anchor or PurePosixPath(executable).is_absolute():
        return "which is not relative", relative
    if ".." in windows.parts:
        return "which leaves the plugin's directory", "Keep the executable inside it, without .."
    return None if windows.name else ("which names no file", relative)


def _resources(top: Section, provider: Provider, variables: Variables) -> tuple[Path, dict[str, Any]]:
    section = top.section("resources", ("data_dir",))
    ollama = section.section("ollama")
    for key in _HOSTS_OWN_KEYS:
        ollama.text(key)
    text = section.text("data_dir", f"${{AOG_DATA_DIR}}/engines/{provider.name}")
    data_dir = variables.data_dir = _data_dir(section, text, variables)
    rest = {key: value for key, value in section.data.items() if key != "data_dir"}
    return data_dir, {"data_dir": str(data_dir), **_expanded(section, (), rest, variables)}


def _data_dir(section: Section, text: str, variables: Variables) -> Path:
    """Return the data directory; for an invalid one a stand-in, so that ${DATA_DIR} causes no second problem."""
    try:
        expanded = variables.expand(text)
        if not Path(expanded).is_absolute():
            fix = "Start it with ${AOG_DATA_DIR}, ${HOME} or ${PLUGIN_DIR}"
            raise VariableError(f"is {quoted(expanded)}, not an absolute path", fix)
        expanded.encode()
        return Path(os.path.normpath(expanded))
    except VariableError as error:
        what, fix = error.what, error.fix
    except UnicodeEncodeError as error:
        what, fix = f"is {error.object!a}, which is not UTF-8", "Name a directory in UTF-8, here or in AOG_DATA_DIR"
    section.complain(("data_dir",), what, fix)
    return Path(section.source.file).parent


def _engine(top: Section, provider: Provider, variables: Variables) -> tuple[str, dict[str, Any]]:
    local = provider.type == "local"
    section = top.section("engine", required=local)
    options = {key: value for key, value in section.data.items() if key != "name"}
    name = section.text("name", required=local) if section.data else ""  # report a missing section once
    return name, _expanded(section, (), options, variables)


def _expanded(section: Section, where: KeyPath, value: Any, variables: Variables) -> Any:
    """Return `value` with the variables in its texts expanded; keys are unchanged."""
    if isinstance(value, dict):
        return {key: _expanded(section, (*where, key), item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(section, (*where, index), item, variables) for index, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        try:
            return variables.expand(value)
        except VariableError as error:
            section.complain(where, error.what, error.fix)
    return value
