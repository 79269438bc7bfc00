from __future__ import annotations

import string
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InvalidRequestError
from engine_plugin.models.names import is_model_name, near_names, other_case, validate_model_name
from engine_plugin.system.sizes import byte_size, parameter_size

ALPHABET = set(string.ascii_letters + string.digits + "._+-")


@pytest.mark.parametrize("name", ["a", "tiny-chat", "Qwen3-0.6B_Q4.K+x", "7b", "a" * 128, "console", "com10"])
def test_valid_name_is_returned(name: str) -> None:
    assert validate_model_name(name) == name


@pytest.mark.promise("P20")
@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", ".hidden", "-x", "a/b", "a\\b", "../a", "a.", "a b", "é", "a\n", "a:b", "a" * 129, 7, None],
        *["CON", "nul", "Com1", "lpt9.v2", "aux.gguf", "prn.a.b", "COM0"],
    ],
)
def test_invalid_name_is_rejected_with_its_field(name: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^model: "):
        validate_model_name(name)


def test_long_invalid_name_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate_model_name("/" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.promise("P20")
@given(st.one_of(st.text(max_size=140), st.text(alphabet=[*sorted(ALPHABET), *"/\\\0"], max_size=140)))
def test_no_accepted_name_leaves_the_root(name: str) -> None:
    if not is_model_name(name):
        return
    root = Path("/srv/models")
    assert (root / f"{name}.gguf").parent == root
    windows = PureWindowsPath("C:/models") / f"{name}.gguf"
    assert windows.parent == PureWindowsPath("C:/models")
    assert windows.name == f"{name}.gguf"
    assert set(name) <= ALPHABET
    assert 1 <= len(name) <= 128
    assert name[0].isalnum()
    assert not name.endswith(".")


@given(st.text(alphabet=sorted(ALPHABET), min_size=1, max_size=128))
def test_name_of_allowed_characters_is_rejected_for_listed_reasons_only(name: str) -> None:
    device = name.partition(".")[0].upper()
    reserved = device in {"CON", "PRN", "AUX", "NUL"} or (device[:-1] in {"COM", "LPT"} and device[-1:].isdigit())
    assert is_model_name(name) == (name[0].isalnum() and name[-1] != "." and not reserved)


def test_a_name_that_differs_by_case_only_is_found() -> None:
    assert other_case("Tiny", ["other", "tiny"]) == "tiny"
    assert other_case("tiny", ["other", "tiny"]) == ""


def test_near_names_are_ordered_by_similarity() -> None:
    assert near_names("Tiny-cha", ["tiny-rerank", "tiny-chat", "llama"])[0] == "tiny-chat"
    assert near_names("zzz", ["tiny-chat"]) == []


def test_the_same_model_with_another_tag_or_owner_is_near() -> None:
    names = ["llama3.2:1b", "hf.co/somebody/Think-GGUF:Q4_K_M", "think:8b", "thing:latest"]
    assert near_names("think", names)[0] == "think:8b"
    assert near_names("think:70b-instruct-q8_0", names)[0] == "think:8b"
    assert near_names("think-gguf", names)[0] == "hf.co/somebody/Think-GGUF:Q4_K_M"
    assert near_names("llama3.2", names) == ["llama3.2:1b"]
    assert len(near_names("a", ["a:1", "a:2", "a:3", "a:4"])) == 3


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *[
            (0, ""),
            (-1, ""),
            (999, "999"),
            (1000, "1K"),
            (129_216, "129K"),
            (270_000_000, "270M"),
            (999_600_000, "1B"),
        ],
        *[(1_500_000_000, "1.5B"), (8_030_261_248, "8B"), (9_960_000_000, "10B"), (70_553_706_496, "71B")],
        *[(1_200_000_000_000, "1.2T"), (5_000_000_000_000_000, "5000T")],
    ],
)
def test_short_numbers_of_parameters(count: int, text: str) -> None:
    assert parameter_size(count) == text


def test_short_numbers_of_bytes() -> None:
    assert [byte_size(size) for size in (0, 1023, 1536, 5 << 30)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5 GiB"]
