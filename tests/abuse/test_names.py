"""Names of models and sources of pulls: no name leads out of the store, and every source is parsed or rejected."""

from __future__ import annotations

import asyncio
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine_plugin.download.source import HttpSource, without_secrets
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError, NotFoundError, PullError
from engine_plugin.models.names import is_model_name, validate_model_name
from engine_plugin.models.request import FileSources, LocalSource, PullRequest, plan_pull
from engine_plugin.models.store import ModelStore, bundled_samples
from tests.abuse.examples import ODD_TEXT
from tests.models.fakes import Inspector

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICES = ["CON", "con", "PRN", "AUX", "NUL", "nul", "COM1", "COM9", "LPT1", "COM¹", "CONIN$", "CLOCK$"]
NAMES = (
    st.text("aZ09._+-/\\:*?\"<>| \0\n\t~$%&{}'", max_size=140)
    | ODD_TEXT
    | st.builds(
        str.__add__, st.sampled_from(DEVICES), st.sampled_from(["", ".", " ", ".gguf", ".a.b", ":x", ":$DATA"])
    )
    | st.builds(
        lambda text, form: unicodedata.normalize(form, text), st.text(max_size=20), st.sampled_from(["NFC", "NFKC"])
    )
    | st.sampled_from(
        ["..", "...", ". .", "../a", "..\\a", "/etc/passwd", "C:\\a", "C:a", "\\\\h\\s", "a/../../b", "~"]
    )
    | st.sampled_from(
        ["．．／a", "a\u2215b", "a\u202egguf.exe", "a\u200b", "\ufeffa", "a\u0130", "ﬁ", "a.", "a ", "a" * 129]
    )
)
STORES = [PurePosixPath("/srv/models"), PureWindowsPath("C:/models"), PureWindowsPath("//host/share/models")]


@pytest.mark.promise("P20")
@given(NAMES)
@example("a" * 128)
def test_accepted_name_is_one_file_of_the_store_on_every_system(name: str) -> None:
    if not is_model_name(name):
        with pytest.raises(InvalidRequestError, match=r"^model: ") as refused:
            validate_model_name(name)
        assert len(refused.value.message) < 500
        return
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert unicodedata.normalize(form, name) == name
    assert name.isascii()
    assert name.isprintable()
    for store in STORES:
        for suffix in (".gguf", ".json", ".part"):
            path = store / f"{name}{suffix}"
            assert path.parent == store
            assert path.name == f"{name}{suffix}"
    assert len(f"{name}.gguf.json".encode()) <= 255
    assert not PureWindowsPath(f"{name}.gguf").is_reserved()
    assert not name.endswith((".", " "))


def outside(root: Path) -> set[str]:
    return {path.relative_to(root.parent).as_posix() for path in root.parent.rglob("*") if root not in path.parents}


@pytest.mark.promise("P20")
@given(NAMES)
def test_any_name_stays_inside_the_store(tmp_path: Path, name: str) -> None:
    """Found, deleted, pulled: only what the caller may name, and never what lies beside the store."""
    root = tmp_path / "models"
    root.mkdir(exist_ok=True)
    for bystander in (tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "a"):
        bystander.write_bytes(b"GGUF")
    before = outside(root)

    async def play() -> None:
        store = ModelStore(root, inspect=Inspector(), samples=bundled_samples())
        attempts: list[Callable[[], Any]] = [
            lambda: store.get(name),
            lambda: store.delete(name),
            lambda: drain(store, PullRequest(name)),
            lambda: drain(store, PullRequest(name, source="tiny-chat")),
        ]
        try:
            for attempt in attempts:
                try:
                    await attempt()
                except (InvalidRequestError, NotFoundError, PullError) as error:
                    complaint = error.message
                    assert len(complaint) < 2000
        finally:
            await store.aclose()

    async def drain(store: ModelStore, request: PullRequest) -> None:
        async for _ in store.pull(request):
            pass

    asyncio.run(play())
    assert outside(root) == before
    for path in root.rglob("*"):
        assert path.parent in (root, root / ".partial")
        if path.suffix == ".gguf":
            assert is_model_name(path.stem)
            path.unlink()


SCHEMES = st.sampled_from(
    ["a_b", "http", "https", "HTTP", "file", "ftp", "hf", "data", "javascript", "", "C", "x" * 50]
)
PARTS = st.text("a.:/@[]?#%\\ \0é1-_", max_size=12) | ODD_TEXT
SOURCES = (
    st.builds(
        lambda scheme, *parts: f"{scheme}://{''.join(parts)}",
        SCHEMES,
        st.sampled_from(["", "user:secret@", "@", "a@b@", ":secret@"]),
        st.sampled_from(
            ["", "h", "h:80", "h:x", "h:99999", "[", "[::1]", "[::1", "é", "ℂ", "h..h", "localhost", "127.1"]
        ),
        st.sampled_from(["", "/", "\\", "/../"]),
        PARTS,
        st.sampled_from(["", ".gguf", "/x.gguf", "/x.GGUF?token=secret", ".gguf#sha256=secret", "%2e%2e%2fx.gguf"]),
    )
    | PARTS
    | st.builds(lambda text: f"{text}.gguf", PARTS)
)
DIGESTS = st.sampled_from(["", "0" * 64, "sha256:" + "A" * 64, "0", "x" * 64, "sha256:", "０" * 64]) | ODD_TEXT


@pytest.mark.promise("P31", "P21")
@given(SOURCES, st.sampled_from(["", "name", "../name"]), DIGESTS, st.sampled_from(["", "chat", "x"]))
@example("file://[/x.gguf", "", "", "")
@example("file://h℀/x.gguf", "name", "", "")
def test_any_source_is_parsed_or_rejected_without_its_secrets(
    source: str, name: str, sha256: str, model_type: str
) -> None:
    """No message contains the secrets in it."""
    request = PullRequest(name, source, sha256, model_type=model_type) if name else PullRequest(source, "", sha256)
    shown = [repr(request), without_secrets(source)]
    try:
        plan = plan_pull(request, FileSources(".gguf"), bundled_samples(), ["present"])
    except (InvalidRequestError, ModelNotFoundError) as error:
        shown.append(error.message)
        field = error.message.partition(":")[0]
        assert field in ("model", "source", "sha256", "model_type")
    else:
        shown.append(repr(plan))
        assert is_model_name(plan.name)
        assert isinstance(plan.source, HttpSource | LocalSource)
        if isinstance(plan.source, HttpSource):
            assert plan.source.url.startswith(("http://", "https://"))
            assert "#" not in plan.source.url
            shown.append(plan.source.label)
    if "://" in source.lstrip(":/"):  # what begins so names no scheme and is no URL
        assert not [text for text in shown if "secret" in text]
