"""Any file is a manifest or raises ManifestError with its problems, never another error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import ManifestError
from engine_plugin.manifest import load_manifest
from tests.manifest.conftest import GOOD, HERE

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.errors import Problem

NAMES = st.sampled_from(
    f"version provider services platforms resources engine name type data_dir {HERE} executable ollama "
    "service_name task_type protocol expose_protocol endpoint auth_type auth_fields default_model support_models "
    "config_ref timeout capabilities support_streaming".split()
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["1.0", "local", "chat", "${HOME}", "${", "${DATA_DIR}/x", "\udc80", "/"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=8), inner, max_size=8),
    max_leaves=40,
)


def load_or_explain(path: Path, content: bytes) -> None:
    """Load the file: the result is a manifest, or problems with a place and a fix."""
    path.write_bytes(content)
    problems: tuple[Problem, ...] = ()
    loaded = None
    try:
        manifest = load_manifest(path, {})
        loaded = json.loads(manifest.to_json())
        manifest.executable()
    except ManifestError as error:
        problems = error.problems
        str(error).encode()
    assert loaded or problems
    for problem in problems:
        assert problem.line >= 0
        assert problem.what
        assert problem.fix


@pytest.mark.promise("P22")
@given(text=st.text() | st.text(alphabet=" \n\t-:?[]{}&*!|>'\"%@`#,~<=.\\0aé"), before=st.booleans())
def test_any_text_is_loaded_or_rejected_with_problems(tmp_path: Path, text: str, before: bool) -> None:
    load_or_explain(tmp_path / "plugin.yaml", f"{GOOD if before else ''}{text}".encode(errors="surrogatepass"))


@pytest.mark.promise("P22")
@given(content=st.binary())
def test_any_bytes_are_loaded_or_rejected_with_problems(tmp_path: Path, content: bytes) -> None:
    load_or_explain(tmp_path / "plugin.yaml", content)


@pytest.mark.promise("P22")
@given(value=VALUES, key=NAMES)
def test_any_structure_is_loaded_or_rejected_with_problems(tmp_path: Path, value: Any, key: str) -> None:
    good = {
        "version": "1.0",
        "provider": {"name": "p", "version": "1", "type": "local"},
        "services": [{"service_name": "chat", key: value}],
        "engine": {"name": "llamacpp", "option": value},
    }
    for data in (value, {**good, key: value}, good):
        load_or_explain(tmp_path / "plugin.json", json.dumps(data).encode())
