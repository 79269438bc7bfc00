"""What a manifest may contain, what it means, and every problem reported about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import pytest

from engine_plugin.errors import ManifestError, Problem, ServiceNotFoundError
from engine_plugin.manifest import PLATFORM_KEYS, SERVICE_NAMES, ServiceCapabilities, inspect_manifest, load_manifest
from tests.manifest.conftest import GOOD, changed

if TYPE_CHECKING:
    from collections.abc import Callable

# Lines of GOOD: 1 version, 2 provider, 3 name, 4 version, 5 type, 6 services, 7 service_name, 8 config_ref,
# 9 engine, 10 engine.name.
CHAT = "  - service_name: chat\n"
BAD: list[tuple[str, int, str]] = [
    (changed('version: "1.0"\n', ""), 1, "version is missing. Add version"),
    (changed('"1.0"', "1.0"), 1, 'number 1.0, not a text. Write it in quotes: version: "1.0"'),
    (changed('"1.0"', '"2.0"'), 1, 'Write version: "1.0"'),
    (changed('"1.0"', "[1]"), 1, "is a list, not a text"),
    ('version: "1.0"\nengine: {name: x}\nservices: [{service_name: chat}]\n', 1, "provider is missing"),
    (changed("provider:\n", "provider: {}\nwas:\n"), 2, "provider is empty"),
    (changed("provider:\n", "provider: 5\nwas:\n"), 2, "provider is the number 5, not a mapping"),
    (changed("  name: sample-plugin\n", ""), 2, "provider.name is missing"),
    (changed("name: sample-plugin", "name:"), 3, "provider.name is empty"),
    (changed("sample-plugin", "../evil"), 3, "cannot name the plugin's directory"),
    (changed("sample-plugin", ".hidden"), 3, "cannot name the plugin's directory"),
    (changed("sample-plugin", "x" * 65), 3, "up to 63"),
    (changed("sample-plugin", '"a\\n"'), 3, "cannot name"),
    (changed("sample-plugin", "Con"), 3, "Windows"),
    (changed("sample-plugin", "lpt1.plugin"), 3, "Windows"),
    (changed("sample-plugin", "sample."), 3, "Windows"),
    (changed("sample-plugin", "true"), 3, 'boolean true, not a text. Write it in quotes: name: "true"'),
    (changed("  version: 1.0.0\n", ""), 2, "provider.version is missing"),
    (changed("1.0.0", "1.0"), 4, "provider.version is the number 1.0"),
    *(
        (changed("1.0.0", number), 4, f'is the number {number}, not a text. Write it in quotes: version: "{number}"')
        for number in ("1.10", "2.0", "0x1F", "1e3", "-0", "123456789012345678", ".5")
    ),
    (changed("1.0.0", "True"), 4, 'is the boolean True, not a text. Write it in quotes: version: "True"'),
    (changed("  type: local\n", ""), 2, "provider.type is missing"),
    (changed("local", "Local"), 5, "Did you mean local? It must be one of: local, remote"),
    (changed("type: local", "type: local\n  author: [me]"), 6, "provider.author is a list"),
    (changed(f"{CHAT}    config_ref: openai:chat\n", ""), 6, "services declares no service"),
    (changed(f"services:\n{CHAT}    config_ref: openai:chat\n", ""), 1, "services declares no service"),
    (
        changed(f"services:\n{CHAT}    config_ref: openai:chat\n", "services: []\n"),
        6,
        "Declare at least one of: chat",
    ),
    (changed(f"services:\n{CHAT}    config_ref: openai:chat\n", "services: {chat: 1}\n"), 6, "a mapping, not a list"),
    (changed(CHAT, f"  - chat\n{CHAT}"), 7, "services[0] is the text 'chat', not a mapping"),
    (changed("service_name: chat", "service_name: chatt"), 7, "Did you mean chat? It must be one of: chat, generate"),
    (changed("service_name: chat", "service_name: speech_to_text"), 7, "Did you mean speech-to-text?"),
    (changed("service_name: chat", "service_name: painting"), 7, ", ".join(SERVICE_NAMES)),
    (changed("service_name: chat", "task_type: chat"), 7, "services[0].service_name is missing"),
    (changed("engine:", f"{CHAT}engine:"), 9, "services[1].service_name is 'chat', already declared in line 7"),
    *(
        (changed(CHAT, f"{CHAT}    timeout: {value}\n"), 8, f"services[0].timeout is {words}")
        for value, words in (
            ("1.5", "the number 1.5, not an integer"),
            ('"60"', "the text '60', not an integer"),
            ("true", "the boolean true, not an integer"),
            ("60s", "the text '60s', not an integer"),
            ("1:30", "the text '1:30', not an integer"),
            ("010", "the text '010', not an integer"),
            ("[60]", "a list, not an integer"),
            ("3000000000", "3000000000, which is too large"),
        )
    ),
    (changed(CHAT, f"{CHAT}    expose_protocol: http\n"), 8, "Did you mean HTTP? It must be one of: HTTP, WEBSOCKET"),
    (changed(CHAT, f"{CHAT}    expose_protocol: GRPC\n"), 8, "one of: HTTP, WEBSOCKET"),
    (changed(CHAT, f"{CHAT}    capabilities: [x]\n"), 8, "capabilities is a list, not a mapping"),
    (changed(CHAT, f"{CHAT}    capabilities:\n      support_streaming: 'yes'\n"), 9, "Write true or false"),
    (changed(CHAT, f"{CHAT}    capabilities:\n      support_streaming: 1\n"), 9, "the number 1, not a boolean"),
    (changed(CHAT, f"{CHAT}    support_models: tiny\n"), 8, "support_models is the text 'tiny', not a list"),
    (changed(CHAT, f"{CHAT}    support_models:\n      - a\n      - 7\n"), 10, "support_models[1] is the number 7"),
    (changed(CHAT, f"{CHAT}    support_models: ['']\n"), 8, "support_models[0] is the text ''"),
    (changed(CHAT, f"{CHAT}    auth_fields: {{a: b}}\n"), 8, "auth_fields is a mapping, not a list"),
    (changed(CHAT, f"{CHAT}    middlewares: x\n"), 8, "middlewares is the text"),
    (changed(CHAT, f"{CHAT}    endpoint: 5\n"), 8, "endpoint is the number 5"),
    (changed("openai:chat", "openai"), 8, "Write it as flavor:service"),
    (changed("openai:chat", "a:b:c"), 8, "config_ref is 'a:b:c'"),
    (changed("openai:chat", "{openai: chat}"), 8, "config_ref is a mapping"),
    (f"{GOOD}platforms: [linux_amd64]\n", 11, "platforms is a list, not a mapping"),
    (
        f"{GOOD}platforms:\n  linux-amd64: {{executable: x}}\n",
        12,
        "Did you mean linux_amd64? Use one of: linux_amd64",
    ),
    (f"{GOOD}platforms:\n  plan9_386: {{executable: x}}\n", 12, ", ".join(PLATFORM_KEYS)),
    (f"{GOOD}platforms:\n  linux_amd64:\n", 12, "platforms.linux_amd64 is empty"),
    (f"{GOOD}platforms:\n  linux_amd64: bin/x\n", 12, "not a mapping"),
    (f"{GOOD}platforms:\n  linux_amd64: {{dependencies: [x]}}\n", 12, "executable is missing"),
    (f"{GOOD}platforms:\n  linux_amd64: {{executable: x, dependencies: y}}\n", 12, "dependencies is the text"),
    *(
        (f"{GOOD}platforms:\n  {key}:\n    executable: '{path}'\n", 13, words)
        for key, path, words in (
            ("linux_amd64", "/bin/sh", "is not relative"),
            ("windows_amd64", "C:/x.exe", "is not relative"),
            ("windows_amd64", "C:x.exe", "is not relative"),
            ("windows_amd64", "\\x.exe", "is not relative"),
            ("linux_amd64", "bin/../../sh", "leaves the plugin's directory"),
            ("windows_amd64", "bin\\..\\x.exe", "leaves the plugin's directory"),
            ("linux_amd64", "bin\\x", "contains a backslash"),
            ("linux_amd64", ".", "names no file"),
        )
    ),
    (changed("engine:\n  name: llamacpp\n", ""), 1, "engine is missing"),
    (changed("engine:\n  name: llamacpp\n", "engine: llamacpp\n"), 9, "engine is the text 'llamacpp', not a mapping"),
    (changed("engine:\n  name: llamacpp\n", "engine: {}\n"), 9, "engine is empty"),
    (changed("  name: llamacpp\n", "  threads: 2\n"), 9, "engine.name is missing"),
    (changed("name: llamacpp", "name: 5"), 10, "engine.name is the number 5"),
    (f"{GOOD}  key: ${{NOPE}}\n", 11, "${AOG_DATA_DIR}, ${DATA_DIR}, ${PLUGIN_DIR}, ${HOME}"),
    (f"{GOOD}  key: ${{home}}\n", 11, "Did you mean ${HOME}?"),
    (f"{GOOD}  key:\n    - ok\n    - a: ${{HOME\n", 13, "engine.key[1].a contains '${HOME' without a closing brace"),
    (f"{GOOD}  key: ${{HO${{ME}}\n", 11, "without a closing brace"),
    (f"{GOOD}resources: 5\n", 11, "resources is the number 5"),
    (f"{GOOD}resources:\n  data_dir: relative/path\n", 12, "not an absolute path"),
    (f"{GOOD}resources:\n  data_dir: ${{DATA_DIR}}/x\n", 12, "which is data_dir itself"),
    (f"{GOOD}resources:\n  data_dir: ${{X}}\n", 12, "unknown variable '${X}'"),
    (f"{GOOD}resources:\n  data_dir: [x]\n", 12, "data_dir is a list"),
    (f"{GOOD}resources:\n  ollama: {{models_dir: [x]}}\n", 12, "resources.ollama.models_dir is a list"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD)
def test_invalid_manifest_is_rejected_with_line_and_fix(
    write: Callable[..., Path], environ: dict[str, str], text: str, line: int, words: str
) -> None:
    path = write(text)
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, environ)
    assert [problem.severity for problem in caught.value.problems] == ["error"], "one mistake, one complaint"
    problem = caught.value.problems[0]
    assert words in f"{problem.what}. {problem.fix}"
    assert (problem.file, problem.line) == (str(path), line)
    assert f"{path}:{line}: error: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (changed(CHAT, f"{CHAT}    timout: 5\n"), 8, "timout is not a known key. Did you mean timeout?"),
        (changed("type: local", "type: local\n  displayName: x"), 6, "Did you mean display_name?"),
        (changed("type: local", "type: local\n  home-page: x"), 6, "Did you mean homepage?"),
        (f"{GOOD}platform: {{}}\n", 11, "Did you mean platforms?"),
        (f"{GOOD}resources:\n  datadir: x\n", 12, "Did you mean data_dir?"),
        (changed(CHAT, f"{CHAT}    capabilities: {{support_stream: true}}\n"), 8, "Did you mean support_streaming?"),
        (
            changed(CHAT, f"{CHAT}    default_model: a\n    support_models: [b]\n"),
            8,
            "which is not in support_models",
        ),
        (changed("    config_ref: openai:chat\n", ""), 7, "config_ref is missing"),
        (changed("openai:chat", "openai:embed"), 8, "Use aliyun:embed, aog:embed"),
        (changed("openai:chat", "openai:responses"), 8, "Use one of chat after the colon"),
        (changed("openai:chat", "llamacpp:chat"), 8, "which is not a flavor of AOG"),
    ],
)
def test_questionable_manifest_gives_a_warning(
    write: Callable[..., Path], environ: dict[str, str], text: str, line: int, words: str
) -> None:
    path = write(text)
    manifest, problems = inspect_manifest(path, environ)
    assert manifest is not None
    assert [(problem.line, problem.severity) for problem in problems] == [(line, "warning")]
    assert words in f"{problems[0].what}. {problems[0].fix}"
    assert load_manifest(path, environ) == manifest


def test_unknown_keys_are_ignored(write: Callable[..., Path], environ: dict[str, str]) -> None:
    text = changed(CHAT, f"{CHAT}    x-notes: [1]\n") + "  anything: {goes: here}\nlicense: Apache-2.0\n"
    assert inspect_manifest(write(text), environ)[1] == []


def test_all_errors_are_reported_in_order(write: Callable[..., Path], environ: dict[str, str]) -> None:
    text = (
        changed('"1.0"', "3").replace("local", "far").replace("chat\n    config", "chad\n    timeout: x\n    config")
    )
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(text), environ)
    assert [problem.line for problem in caught.value.problems] == [1, 5, 7, 8]
    assert len(str(caught.value).splitlines()) == 4


def test_all_fields_of_a_manifest_are_kept(write: Callable[..., Path], environ: dict[str, str]) -> None:
    path = write(
        """\
version: "1.0"
provider: {name: p, display_name: P, version: "2", type: remote, author: A, description: D, engine_host: E}
services:
  - {service_name: rerank, timeout: -1}
  - service_name: chat
    task_type: t
    protocol: http
    expose_protocol: WEBSOCKET
    endpoint: /v1
    auth_type: apikey
    auth_fields: [key, secret]
    default_model: m
    support_models: [m, n]
    config_ref: openai:chat
    timeout: 90
    capabilities: {support_streaming: true, support_bidirectional: true}
platforms:
  windows_amd64: {executable: bin/p.exe, dependencies: [a, b]}
resources: {data_dir: "${HOME}/data/../p", other: ["${DATA_DIR}/x"]}
engine: {name: openai, options: {dir: "${PLUGIN_DIR}/${DATA_DIR}", n: 3}, off: on}
"""
    )
    manifest = load_manifest(path, environ)
    home = Path(environ["HOME"])
    assert (manifest.path, manifest.plugin_dir) == (path, path.parent)
    assert (manifest.provider.name, manifest.provider.engine_host) == ("p", "E")
    assert list(manifest.services) == ["rerank", "chat"]
    assert manifest.service("rerank").timeout == -1
    assert manifest.service("rerank").expose_protocol == "HTTP"
    chat = manifest.service("chat")
    assert (chat.auth_fields, chat.support_models) == (("key", "secret"), ("m", "n"))
    assert (chat.timeout, chat.capabilities) == (90, ServiceCapabilities(True, True))
    assert manifest.platforms["windows_amd64"].dependencies == ("a", "b")
    assert manifest.data_dir == home / "p"
    assert manifest.resources == {"data_dir": str(home / "p"), "other": [f"{home / 'p'}/x"]}
    assert manifest.engine_name == "openai"
    assert manifest.engine_options == {"options": {"dir": f"{path.parent}/{home / 'p'}", "n": 3}, "off": "on"}


def test_undeclared_service_error_lists_the_declared_ones(
    write: Callable[..., Path], environ: dict[str, str]
) -> None:
    with pytest.raises(ServiceNotFoundError, match="sample-plugin has no service 'embed'; it declares: chat"):
        load_manifest(write(), environ).service("embed")


def test_remote_service_needs_no_engine(write: Callable[..., Path], environ: dict[str, str]) -> None:
    text = changed("type: local", "type: remote").replace("engine:\n  name: llamacpp\n", "")
    manifest = load_manifest(write(text), environ)
    assert (manifest.engine_name, manifest.engine_options) == ("", {})


def test_option_problem_has_the_line_of_the_option(write: Callable[..., Path], environ: dict[str, str]) -> None:
    path = write(f"{GOOD}  gpu:\n    layers: many\n")
    manifest = load_manifest(path, environ)
    assert manifest.problem(("engine", "gpu", "layers"), "what", "fix") == Problem(str(path), 12, "what", "fix")
    assert manifest.problem(("engine", "gpu", "absent"), "what", "fix").line == 11
    assert manifest.problem(("absent",), "what", "fix", "warning").severity == "warning"


# Variables


def test_data_directory_defaults_to_that_of_aog(write: Callable[..., Path], environ: dict[str, str]) -> None:
    assert load_manifest(write(), environ).data_dir == Path(environ["AOG_DATA_DIR"], "engines", "sample-plugin")


def test_data_directory_without_aog_is_that_of_the_user(write: Callable[..., Path], environ: dict[str, str]) -> None:
    import platformdirs

    del environ["AOG_DATA_DIR"]
    expected = Path(platformdirs.user_data_dir("engine-plugin", appauthor=False), "engines", "sample-plugin")
    assert load_manifest(write(), environ).data_dir == expected


def test_relative_aog_data_dir_is_ignored_with_a_warning(write: Callable[..., Path], environ: dict[str, str]) -> None:
    environ["AOG_DATA_DIR"] = "here"
    manifest, problems = inspect_manifest(write(), environ)
    assert manifest is not None
    assert manifest.data_dir.is_absolute()
    assert [problem.severity for problem in problems] == ["warning"]
    assert "'here' is relative" in problems[0].what


def test_variables_default_to_the_process_environment(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOG_DATA_DIR", str(tmp_path / "elsewhere"))
    assert load_manifest(write()).data_dir == tmp_path / "elsewhere" / "engines" / "sample-plugin"


def test_value_of_a_variable_is_not_expanded_again(
    write: Callable[..., Path], environ: dict[str, str], tmp_path: Path
) -> None:
    environ["AOG_DATA_DIR"] = str(tmp_path / "${HOME}")
    text = f"{GOOD}  key: $HOME $ {{x}} ${{AOG_DATA_DIR}}\n"
    assert load_manifest(write(text), environ).engine_options == {"key": f"$HOME $ {{x}} {tmp_path / '${HOME}'}"}


def test_relative_manifest_path_becomes_absolute(
    write: Callable[..., Path], environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    monkeypatch.chdir(tmp_path)
    assert load_manifest(Path("x/../sample-plugin/plugin.yaml"), environ).plugin_dir == tmp_path / "sample-plugin"


@pytest.mark.promise("L7")
@pytest.mark.parametrize(
    "found", ["~/.local/share/engine-plugin", RuntimeError("Could not determine home directory.")]
)
def test_missing_home_directory_error_names_the_variable_to_set(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, found: str | Exception
) -> None:
    """`found` is what platformdirs returns or raises where HOME is not set and the user has no entry in passwd."""

    def user_data_dir(*_arguments: object, **_named: object) -> str:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(platformdirs, "user_data_dir", user_data_dir)
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(), {})
    said = str(caught.value)
    assert "resources.data_dir uses ${AOG_DATA_DIR}, but this user has no home directory" in said
    assert "Set HOME or AOG_DATA_DIR in the environment, or resources.data_dir in this file" in said
