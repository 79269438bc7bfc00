"""What a request to pull a model folder means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.remote import FetchPolicy
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError
from engine_plugin.models.hubs import RepositorySource, hubs_of
from engine_plugin.models.info import bundled_samples
from engine_plugin.models.names import is_model_name, validate_model_name
from engine_plugin.models.request import FolderSources, LocalSource, PullPlan, PullRequest, plan_pull

if TYPE_CHECKING:
    from pathlib import Path

HEX = "0123456789abcdef" * 4


def plan(request: PullRequest, hub: str = "hf", **environ: str) -> PullPlan:
    sources = FolderSources(hubs_of(environ, FetchPolicy()), hub)
    return plan_pull(request, sources, bundled_samples("openvino"), ["my/own"])


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Owner/Name", RepositorySource("hf", "Owner/Name", "main")),
        ("Owner/Name@v1.0", RepositorySource("hf", "Owner/Name", "v1.0")),
        ("hf:Owner/Name", RepositorySource("hf", "Owner/Name", "main")),
        ("hf:Owner/Name@refs/pr/1", RepositorySource("hf", "Owner/Name", "refs/pr/1")),
        ("ms:Owner/Name", RepositorySource("ms", "Owner/Name", "master")),
        ("ms:Owner/Name@abc", RepositorySource("ms", "Owner/Name", "abc")),
        ("https://huggingface.co/Owner/Name", RepositorySource("hf", "Owner/Name", "main")),
        ("https://huggingface.co/Owner/Name/tree/v2", RepositorySource("hf", "Owner/Name", "v2")),
        ("https://hf.co/Owner/Name/?x=1", RepositorySource("hf", "Owner/Name", "main")),
        ("https://www.modelscope.cn/models/Owner/Name/files", RepositorySource("ms", "Owner/Name", "master")),
        ("https://modelscope.cn/models/Owner/Name", RepositorySource("ms", "Owner/Name", "master")),
    ],
)
def test_the_forms_of_a_repository(text: str, source: RepositorySource) -> None:
    found = plan(PullRequest(text))
    assert (found.name, found.source) == ("Owner/Name", source)
    assert plan(PullRequest("mine", source=text)).name == "mine"


def test_the_default_hub_is_chosen() -> None:
    assert plan(PullRequest("Owner/Name"), "ms").source == RepositorySource("ms", "Owner/Name", "master")


def test_pages_of_a_mirror_are_pages_of_the_hub() -> None:
    found = plan(PullRequest("https://mirror.example/Owner/Name"), HF_ENDPOINT="https://mirror.example/")
    assert found.source == RepositorySource("hf", "Owner/Name", "main")


def test_relative_path_must_begin_with_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in (str(folder), folder.as_uri(), "./some/model"):
        assert (plan(PullRequest(text)).source, plan(PullRequest(text)).name) == (LocalSource(folder), "model")
    assert isinstance(plan(PullRequest("some/model")).source, RepositorySource)


def test_sample_has_its_digest_and_kind() -> None:
    sample = bundled_samples("openvino").get("tiny-speak")
    assert sample is not None
    assert plan(PullRequest("tiny-speak")) == PullPlan(
        "tiny-speak",
        LocalSource(sample.path, sample),
        sample.digest.removeprefix("sha256:"),
        "text-to-speech",
        insecure=False,
    )
    with pytest.raises(InvalidRequestError, match=r"^sha256: "):
        plan(PullRequest("tiny-speak", sha256=HEX))


@pytest.mark.promise("P31")
@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (PullRequest(""), "model"),
        (PullRequest("hf:owner"), "model"),
        (PullRequest("hf:a/b/c"), "model"),
        (PullRequest("hf:../b"), "model"),
        (PullRequest("hf:a/b@../../x"), "model"),
        (PullRequest("hf:a/b@"), ""),
        (PullRequest("x", source="a b/c"), "source"),
        (PullRequest("../x", source="hf:a/b"), "model"),
        (PullRequest("https://example.org/model.gguf"), "model"),
        (PullRequest("ftp://huggingface.co/a/b"), "model"),
        (PullRequest("hf://a/b"), "model"),
        (PullRequest("https://huggingface.co/only-owner"), "model"),
        (PullRequest("a/b", sha256="x"), "sha256"),
        (PullRequest("a/b", password="pass\nword"), "password"),
        (PullRequest("a/b", model_type="text-to-music"), "model_type"),
        (PullRequest("x", source="file://other-host/x"), "source"),
    ],
)
def test_invalid_request_names_its_field(request_: PullRequest, field: str) -> None:
    if not field:
        assert plan(request_).source == RepositorySource("hf", "a/b", "main")
        return
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        plan(request_)


@pytest.mark.parametrize(
    ("given", "right"),
    [("hf://", "hf:owner/name"), ("hf://a/b", "hf:a/b"), ("MS://a/b@v1/", "ms:a/b@v1")],
)
def test_reference_with_slashes_is_rejected_with_its_right_form(given: str, right: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^model: '{given}' is not a valid reference. Write '{right}'.$"):
        plan(PullRequest(given))


def test_unknown_reference_lists_what_a_pull_takes(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean tiny-chat") as caught:
        plan(PullRequest("tiny-chatt"))
    for part in ("owner/name", "hf:", "ms:", "tiny-transcribe"):
        assert part in caught.value.message
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        plan(PullRequest(str(tmp_path / "x")))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidRequestError, match="is a file"):
        plan(PullRequest(str(tmp_path / "file")))


@pytest.mark.promise("P21")
def test_repr_has_no_token() -> None:
    found = plan(PullRequest("a/b", password="hidden"), HF_TOKEN="hidden too")
    assert isinstance(found.source, RepositorySource)
    assert found.source.token == "hidden"
    assert "hidden" not in repr(found) + found.source.label
    assert found == plan(PullRequest("a/b"))


@pytest.mark.parametrize("name", ["a", "a/b", "OpenVINO/Qwen3-0.6B-int4-ov", "0/1"])
def test_valid_names_of_folders(name: str) -> None:
    assert validate_model_name(name, owner=True) == name


@pytest.mark.parametrize("name", ["", "/", "a/", "/a", "a//b", "a/b/c", "a/.", "./a", "con/a", "a/b.", None, "a\\b"])
def test_invalid_names_of_folders(name: object) -> None:
    assert not is_model_name(name, owner=True)
    with pytest.raises(InvalidRequestError, match=r"^model: "):
        validate_model_name(name, owner=True)
