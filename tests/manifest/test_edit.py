"""A default model is set in the text of a manifest, and nothing else in it changes."""

from __future__ import annotations

import json
import os
import stat
import sys
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from engine_plugin.errors import ManifestError, PreconditionError, ServiceNotFoundError
from engine_plugin.manifest import load_manifest, surgery
from engine_plugin.manifest.document import INVALID, read_document
from engine_plugin.manifest.edit import set_default_models
from tests.manifest.conftest import GOOD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypothesis.strategies import DrawFn

# In these, {i} is the indentation of the service's keys; what a default model's value is stands between « and ».
OTHERS = {
    "task_type": ("text-generation", '"text generation"', "", "  # none"),
    "endpoint": ("/v1/x", "'/v1/x'  # a \U0001f600 path"),
    "auth_type": ("none", "  none"),
    "config_ref": ("openai:chat", '"openai:chat"'),
    "timeout": ("60", "-1  # as long as it takes"),
    "capabilities": ("{support_streaming: true}", "\n{i}  support_streaming: true\n{i}  # more\n", ""),
}
DEFAULTS = (
    *("«»", "«~»", "«null»", '«""»', "«old»", '«"old"»', "«'old'»", " «old»   # what was there", "«»  # none yet"),
    *("«&a old»", "\n{i}  «old»", "«|-\n{i}  old»", "«>-\n{i}  old»\n", '«"o\\x6cd"»', "«'ol\n{i}   d'»", "«so old»"),
)
LISTS = (
    *("[]", "", "[old]", "[old, 'other' ]", '["old"]  # two: old', "[old,\n{i}    other]", "[old,]", "[old, new/x]"),
    *("[\n{i}  old,  # one\n{i}  ]", "[\n{i}  old,\n{i}  other  # two\n{i}  ]", "[\n{i}  old,\n{i}  other\n{i}]"),
    *("\n{i}- old\n{i}- other  # two", "\n{i}  - old\n\n{i}  # more\n{i}  - 'other'\n", '\n{i}    -   "old"'),
    *("\n{i}  -\n{i}    old", "\n{i}  - new\n", "\n{i}  - new:8b\n{i}  - yes"),
)
COMMENTS = ("", "", "\n", "# é 語 \U0001f600\n", "      # default_model: x\n", "  \n#\n")
NAMES: tuple[str, ...] = (
    "new",
    "new:8b",
    "new/x",
    "7b",
    "yes",
    "null",
    "old",
    "a b",
    'it\'s "é"',
    "a #1",
    "a: 1",
    "- a",
    "1:30",
)
NAMES += ("a,b", "\U0001f600", "\x85\u2028a\ufeff", "\tx\x7f", "*a", "[a]", "C:\\a", "1e5", "a:")
SERVICES = ("chat", "embed", "rerank")


def yaml_service(draw: DrawFn, name: str, indentation: str) -> str:
    """One service in a block, its keys in any order and style."""
    entries = [("service_name", draw(st.sampled_from([name, f'"{name}"', f"'{name}'  # é", f"{name}"])))]
    for key, values in (OTHERS | {"default_model": DEFAULTS, "support_models": LISTS}).items():
        if draw(st.booleans()):
            entries.append((key, draw(st.sampled_from(values))))
    text = ""
    for key, value in draw(st.permutations(entries)):
        text += (indentation + "  " if text else "") + key + ":" + (" " if value[:1] not in ("", "\n") else "")
        text += value.replace("{i}", indentation + "  ").replace("&a", f"&{name}") + (
            "" if value.endswith("\n") else "\n"
        )
        text += draw(st.sampled_from(COMMENTS)) if value[1:2] not in ("|", ">") else ""  # it would be of the value
    return f"{indentation}- {text}"


def flow_service(draw: DrawFn, name: str) -> str:
    """One service in JSON, or in braces."""
    entries: dict[str, Any] = {"service_name": name}
    if draw(st.booleans()):
        entries["default_model"] = draw(st.sampled_from(["old", None, "", "\t\u2028"]))
    entries |= draw(st.sampled_from([{}, {"support_models": []}, {"support_models": ["old", "new"]}]))
    entries |= draw(st.sampled_from([{}, {"endpoint": "/é"}, {"timeout": 1, "auth_type": None}]))
    shuffled = dict(draw(st.permutations(list(entries.items()))))
    text = json.dumps(shuffled, indent=draw(st.sampled_from([None, 1, 4])), ensure_ascii=False)
    if '"default_model": ' in text:
        head, _, rest = text.partition('"default_model": ')
        value = json.dumps(entries["default_model"], ensure_ascii=False)
        text = f'{head}"default_model": «{value}»{rest[len(value) :]}'
    return text


def json_manifest(draw: DrawFn, names: list[str]) -> str:
    """A plugin.json."""
    whole = {
        "version": "1.0",
        "provider": {"name": "p", "version": "1", "type": "local"},
        "engine": {"name": "x"},
        "services": [],
    }
    services = ",\n".join(flow_service(draw, name) for name in names)
    text = json.dumps(whole, indent=draw(st.sampled_from([None, 0, 2, "\t"])))
    return text.replace('"services": []', f'"services": [{services}]')


def yaml_manifest(draw: DrawFn, names: list[str]) -> str:
    """A plugin.yaml, whose services are blocks or in braces and may stand last."""
    indentation = draw(st.sampled_from(["", "  ", "    "]))
    services = ""
    for name in names:
        if draw(st.integers(0, 3)):
            services += yaml_service(draw, name, indentation)
        else:
            services += f"{indentation}-   {flow_service(draw, name)}\n".replace(
                "\n", f"\n{indentation}     "
            ).rstrip(" ")
    top, _, rest = GOOD.partition("services:\n")
    first = draw(st.sampled_from(["", "# first\n", "---\n"]))
    engine = rest[rest.index("engine:") :]
    if draw(st.booleans()):
        return f"{first}{top}services:\n{services}{engine}"
    return f"{first}{top}{engine}services:\n{services}" + draw(st.sampled_from(["", "\n"]))


@st.composite
def manifests(draw: DrawFn) -> str:
    """A manifest with « » around its services' default models."""
    names = draw(st.lists(st.sampled_from(SERVICES), min_size=1, max_size=3, unique=True))
    text = yaml_manifest(draw, names) if draw(st.integers(0, 3)) else json_manifest(draw, names)
    if draw(st.booleans()):
        text = text.rstrip("\n")
    return draw(st.sampled_from(["", "\ufeff"])) + text.replace("\n", draw(st.sampled_from(["\n", "\r\n"])))


def data_of(path: Path) -> Any:
    """What a manifest says."""
    _, data, problems = read_document(path)
    assert data is not INVALID, problems
    return data


def after(data: Any, models: dict[str, str]) -> Any:
    """What it should say once the models are set."""
    data = deepcopy(data)
    for service in data["services"]:
        if (model := models.get(service["service_name"])) is not None:
            service["default_model"] = model
            if service.get("support_models") and model not in service["support_models"]:
                service["support_models"].append(model)
    return data


def is_within(part: str, whole: str) -> bool:
    """Whether `whole` is `part` with characters added."""
    rest = iter(whole)
    return all(char in rest for char in part)


def without_values(marked: str, touched: bool) -> str:
    """A marked manifest as it was, or without those values that may be replaced."""
    kept, *rest = marked.split("«")
    for piece in rest:
        value, _, following = piece.partition("»")
        kept += ("" if touched else value) + following
    return kept


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@given(marked=manifests(), models=st.dictionaries(st.sampled_from(SERVICES), st.sampled_from(NAMES), min_size=1))
def test_every_other_byte_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str, marked: str, models: dict[str, str]
) -> None:
    assume(loader == "CSafeLoader" or "\t" not in marked)  # the parser in Python has no tabs in JSON
    monkeypatch.setattr(surgery, "_LOADER", getattr(yaml, loader))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds of examples would wait for the disk
    old = without_values(marked, touched=False)
    file = tmp_path / ("plugin.json" if old.lstrip("\ufeff").startswith("{") else "plugin.yaml")
    file.write_bytes(old.encode())
    before = data_of(file)
    models = {name: model for name, model in models.items() if name in load_manifest(file).services}
    changed = set_default_models(file, models)
    new = file.read_bytes().decode()
    wanted = after(before, models)
    assert json.dumps(data_of(file), sort_keys=True) == json.dumps(wanted, sort_keys=True)
    assert set(changed) == {
        spec["service_name"]
        for spec, other in zip(wanted["services"], before["services"], strict=True)
        if spec != other
    }
    kept = without_values(marked, touched=bool(changed))
    assert is_within(kept, new)
    assert len(new) - len(kept) <= sum(80 + 8 * len(model) for model in models.values()) + len(old) - len(kept)
    assert new.count("\r\n") == (new.count("\n") if "\r\n" in old else 0)
    if not changed:
        assert new == old
    assert set_default_models(file, models) == ()
    assert {entry.name for entry in tmp_path.iterdir()} <= {"plugin.yaml", "plugin.json"}


def edited(write: Callable[..., Path], old: str, model: str = "new:8b") -> str:
    """GOOD with its service written as `old`, after the model has been set."""
    head, _, tail = GOOD.partition("  - service_name: chat\n    config_ref: openai:chat\n")
    file = write(f"{head}{old}{tail}")
    assert set_default_models(file, {"chat": model}) == ("chat",)
    text = file.read_bytes().decode()
    assert text.startswith(head)
    assert text.endswith(tail)
    return text[len(head) : len(text) - len(tail)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            "  - service_name: chat  # talks\n\n    # converts\n    config_ref: openai:chat\n",
            "  - service_name: chat  # talks\n    default_model: new:8b\n\n"
            "    # converts\n    config_ref: openai:chat\n",
            id="a new line stands below the keys that come before it, a comment stays with its key",
        ),
        pytest.param(
            "- config_ref: openai:chat\n  auth_type: none\n  service_name: chat\n",
            "- config_ref: openai:chat\n  auth_type: none\n  default_model: new:8b\n  service_name: chat\n",
            id="the last of these keys counts",
        ),
        pytest.param(
            "  - service_name: chat\n    default_model:  'tiny'   # small\n",
            "  - service_name: chat\n    default_model:  'new:8b'   # small\n",
            id="quotes and comments stay",
        ),
        pytest.param(
            "  - service_name: chat\n    default_model:\n",
            "  - service_name: chat\n    default_model: new:8b\n",
            id="an empty value",
        ),
        pytest.param(
            "  - service_name: chat\n    default_model: a\n    support_models: [a, b]  # both\n",
            '  - service_name: chat\n    default_model: new:8b\n    support_models: [a, b, "new:8b"]  # both\n',
            id="a list on one line; braces and brackets need quotes around a colon",
        ),
        pytest.param(
            "  - service_name: chat\n    default_model: a\n    support_models:\n    -   a  # one\n    -   b\n\n",
            "  - service_name: chat\n    default_model: new:8b\n    support_models:\n    -   a  # one\n    -   b\n"
            "    -   new:8b\n\n",
            id="a list of lines",
        ),
        pytest.param(
            "  - service_name: chat\n    default_model: a\n    support_models: [\n"
            "      a,  # one\n      b  # two\n    ]\n",
            "  - service_name: chat\n    default_model: new:8b\n    support_models: [\n"
            '      a,  # one\n      b,  # two\n      "new:8b"\n    ]\n',
            id="a list in brackets on lines, whose comments stay with their items",
        ),
        pytest.param(
            "  - {service_name: chat, config_ref: openai:chat}\n",
            '  - {service_name: chat, default_model: "new:8b", config_ref: openai:chat}\n',
            id="a service in braces",
        ),
        pytest.param(
            '  - {\n      "service_name": "chat",  # talks\n      "timeout": 1\n    }\n',
            '  - {\n      "service_name": "chat",  # talks\n      "default_model": "new:8b",\n'
            '      "timeout": 1\n    }\n',
            id="a service in braces on lines",
        ),
    ],
)
def test_the_new_text_is_written_as_a_person_would(write: Callable[..., Path], old: str, new: str) -> None:
    assert edited(write, old) == new


def test_json_stays_json(write: Callable[..., Path]) -> None:
    entry = {"service_name": "chat", "support_models": ["a"]}
    whole = {
        "version": "1.0",
        "provider": {"name": "p", "version": "1", "type": "local"},
        "services": [entry],
        "engine": {"name": "x"},
    }
    for indent in (None, 2, "\t"):
        file = write(json.dumps(whole, indent=indent), "plugin.json")
        assert set_default_models(file, {"chat": "é \U0001f600"}) == ("chat",)
        after_it = json.loads(file.read_text(encoding="utf-8"))["services"]
        assert after_it == [{**entry, "default_model": "é \U0001f600", "support_models": ["a", "é \U0001f600"]}]
        assert list(after_it[0]) == ["service_name", "default_model", "support_models"]


def test_a_link_stays_a_link_and_the_mode_stays(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write()
    file.chmod(0o640)
    link = tmp_path / "linked" / "plugin.yaml"
    link.parent.mkdir()
    try:
        link.symlink_to(file)
    except OSError:
        pytest.skip("this user may not make links")
    assert set_default_models(link, {"chat": "new"}) == ("chat",)
    assert link.is_symlink()
    assert load_manifest(file).service("chat").default_model == "new"
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [entry.name for entry in file.parent.iterdir()] == ["plugin.yaml"]


def refused(file: Path, models: dict[str, str]) -> str:
    """What a refusal says; the file is as it was and alone."""
    before = file.read_bytes()
    with pytest.raises(PreconditionError) as caught:
        set_default_models(file, models)
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    return caught.value.message


def test_a_file_that_may_not_be_written(write: Callable[..., Path]) -> None:
    file = write()
    file.chmod(0o444)
    try:
        assert refused(file, {"chat": "new: 8b"}) == (
            f"{file} was not changed: it may not be written (allow it: chmod u+w {file}). "
            'Write it there yourself: default_model: "new: 8b" for chat.'
        )
        assert set_default_models(file, {}) == ()
    finally:
        file.chmod(0o644)


def test_a_style_that_is_not_foreseen_is_refused(write: Callable[..., Path]) -> None:
    head, _, _ = GOOD.partition("  - service_name")
    tail = "engine:\n  name: llamacpp\n"
    for odd in ("  - ? service_name\n    : chat\n", "  [service_name: chat]\n"):
        assert "a way that this command does not change" in refused(write(f"{head}{odd}{tail}"), {"chat": "new"})
    odd = "  - service_name: chat\n    default_model: |-  # which\n      old\n"
    assert "a way that this command does not change" in refused(write(f"{head}{odd}{tail}"), {"chat": "new"})


def test_who_writes_at_the_same_time_is_not_written_over(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write()
    written = GOOD + "# somebody's\n"
    monkeypatch.setattr(os, "fsync", lambda _: file.write_text(written))
    with pytest.raises(PreconditionError, match="somebody else has changed it"):
        set_default_models(file, {"chat": "new"})
    assert file.read_text() == written
    assert [entry.name for entry in file.parent.iterdir()] == ["plugin.yaml"]


def test_a_full_disk_leaves_the_file(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(write(), {"chat": "new"})


def test_what_is_wrong_already_and_what_is_not_declared(write: Callable[..., Path]) -> None:
    with pytest.raises(ServiceNotFoundError, match="declares no service 'embed'; it has: chat"):
        set_default_models(write(), {"embed": "new"})
    with pytest.raises(ManifestError, match="version"):
        set_default_models(write(GOOD.replace('"1.0"', '"2.0"')), {"chat": "new"})
