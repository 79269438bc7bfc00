from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.source import HttpSource, without_secrets
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError
from engine_plugin.models.info import bundled_samples
from engine_plugin.models.request import FileSources, LocalSource, PullPlan, PullRequest, plan_pull

if TYPE_CHECKING:
    from pathlib import Path

HEX = "0123456789abcdef" * 4


def plan(request: PullRequest) -> PullPlan:
    return plan_pull(request, FileSources(".gguf"), bundled_samples(), ["my-own"])


def test_url_has_name_digest_and_credentials() -> None:
    found = plan(PullRequest(f"https://me:s%40fe@host.example/a/Tiny%2BChat.gguf?token=t#sha256={HEX.upper()}"))
    assert (found.name, found.sha256, found.kind) == ("Tiny+Chat", HEX, "")
    assert isinstance(found.source, HttpSource)
    assert found.source.url == "https://host.example/a/Tiny%2BChat.gguf?token=t"
    assert (found.source.username, found.source.password) == ("me", "s@fe")
    assert found.source.label == "https://host.example/a/Tiny%2BChat.gguf"


def test_with_a_source_the_model_is_the_name() -> None:
    request = PullRequest("mine", source="https://h.example/get?id=1", sha256=f"sha256:{HEX}", model_type="generate")
    found = plan(request)
    assert (found.name, found.sha256, found.kind) == ("mine", HEX, "chat")


def test_sample_has_its_digest_and_kind() -> None:
    found = plan(PullRequest("tiny-rerank-gguf"))
    sample = bundled_samples().get("tiny-rerank-gguf")
    assert sample is not None
    assert found == PullPlan(
        "tiny-rerank-gguf",
        LocalSource(sample.path, sample),
        sample.digest.removeprefix("sha256:"),
        "rerank",
        insecure=False,
    )
    assert plan(PullRequest("copy", source="tiny-rerank-gguf")).name == "copy"


def test_a_path_and_a_file_url_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    plans = [plan(PullRequest("m", source=text)) for text in (str(file), file.as_uri(), "my model.gguf")]
    assert {found.source for found in plans} == {LocalSource(file)}


@pytest.mark.promise("P31")
@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (PullRequest(""), "model"),
        (PullRequest("ftp://h/x.gguf"), "model"),
        (PullRequest("x", source="hf://a/b"), "source"),
        (PullRequest("https:///x.gguf"), "model"),
        (PullRequest("https://h:port/x.gguf"), "model"),
        (PullRequest("https://h/a b.gguf"), "model"),
        (PullRequest("https://h/"), "model"),
        (PullRequest("https://h/..gguf"), "model"),
        (PullRequest("../x", source="https://h/x.gguf"), "model"),
        (PullRequest("https://h/x.gguf#sha256=12"), "model"),
        (PullRequest("https://h/x.gguf", sha256="xyz"), "sha256"),
        (PullRequest(f"https://h/x.gguf#sha256={HEX}", sha256="0" * 64), "sha256"),
        (PullRequest("https://h/x.gguf", model_type="text-to-music"), "model_type"),
        (PullRequest("tiny-chat-gguf", sha256="0" * 64), "sha256"),
        (PullRequest("x", source="file://other-host/x.gguf"), "source"),
        (PullRequest("x", source="file:///etc/passwd"), "source"),
    ],
)
def test_invalid_request_names_its_field(request_: PullRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        plan(request_)


def test_a_folder_is_not_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "x.gguf"
    folder.mkdir()
    with pytest.raises(InvalidRequestError, match="is not a file"):
        plan(PullRequest(str(folder)))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        plan(PullRequest(str(tmp_path / "x.gguf")))


def test_unknown_name_lists_samples_and_near_names() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        plan(PullRequest("tiny-chatt"))
    for part in ("Did you mean tiny-chat-gguf", "tiny-embed-gguf", "tiny-rerank-gguf", ".gguf", "http(s) URL"):
        assert part in caught.value.message


@pytest.mark.promise("P21")
def test_repr_has_no_secrets() -> None:
    request = PullRequest("m", source="https://u:hidden@h/x.gguf?token=hidden", password="hidden", username="u")
    assert "hidden" not in repr(request)
    assert "hidden" not in repr(plan(request))


@pytest.mark.promise("P21")
@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h:8/a.gguf?x=1#y", "https://h:8/a.gguf"),
        ("tiny-chat-gguf", "tiny-chat-gguf"),
        ("https://[bad/a?secret", "https://…"),
        ("no_scheme://u:secret@h/a.gguf", "no_scheme://…"),
    ],
)
def test_label_of_a_url_has_no_secrets(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
