"""What is read from a model's name."""

from __future__ import annotations

import pytest

from engine_plugin.models.families import estimated_context, family_of, parameters_of


@pytest.mark.parametrize(
    ("names", "context"),
    [
        (["qwen3:8b"], 131_072),
        (["qwen3-coder:30b"], 262_144),
        (["OpenVINO/Qwen3-8B-int4-ov"], 131_072),
        (["hf.co/somebody/Llama-3.2-3B-Instruct-GGUF:Q4_K_M"], 131_072),
        (["Meta-Llama-3.1-8B"], 131_072),
        (["Llama-3-8B"], 8_192),
        (["llama-2-7b-chat"], 4_096),
        (["gemma-2-9b"], 8_192),
        (["phi-3.5-mini"], 131_072),
        (["phi4:14b"], 16_384),
        (["Mixtral-8x7B-v0.1"], 32_768),
        (["mistral-nemo"], 131_072),
        (["mistral:7b"], 32_768),
        (["MiniCPM-V-2_6"], 8_192),
        (["deepseek-r1:7b", "qwen2"], 131_072),
        (["my-own", "llama3"], 8_192),
    ],
)
def test_longest_prefix_wins_in_any_spelling(names: list[str], context: int) -> None:
    family = family_of(*names)
    assert family is not None
    assert family.context_length == context


@pytest.mark.parametrize("name", ["", "llama-30b", "my-llama", "gpt-oss:20b", "tiny-chat", "/", "::"])
def test_unknown_name_has_no_family(name: str) -> None:
    assert family_of(name) is None


def test_family_has_features() -> None:
    features = {name: (family_of(name) or pytest.fail(name)).features for name in ("qwq:32b", "llava:7b", "qwen3:4b")}
    assert features == {"qwq:32b": ("thinking",), "llava:7b": ("vision",), "qwen3:4b": ("tools", "thinking")}


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("7.6B", 7.6e9),
        ("129K", 129e3),
        ("135M", 135e6),
        ("8x7B", 56e9),
        ("llama3:70b-instruct-q4_0", 70e9),
        ("foo-1.5b", 1.5e9),
        ("1.0 B", 1e9),
        ("", 0),
        ("q4_0", 0),
        ("tiny-chat", 0),
        ("model-2b2", 0),
    ],
)
def test_parameter_count_is_read_from_the_name(text: str, parameters: float) -> None:
    assert parameters_of(text) == parameters


@pytest.mark.parametrize(
    ("parameters", "context"),
    [(0, 0), (1e6, 8_192), (6.9e9, 8_192), (7e9, 16_384), (13e9, 32_768), (30e9, 65_536), (405e9, 131_072)],
)
def test_context_length_is_estimated_by_size(parameters: float, context: int) -> None:
    assert estimated_context(parameters) == context
