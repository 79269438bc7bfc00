"""The detection of a model's kind and details from its files, and the selection of the files that it needs."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.openvino.models import choose_files, inspect_folder
from engine_plugin.errors import PullError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TEXT = ("openvino_model", "openvino_tokenizer", "openvino_detokenizer")

GRAPH = """<?xml version="1.0"?>
<net name="m" version="11">
 <layers>
  <layer id="0" name="input_ids" type="Parameter" version="opset1">
   <data shape="?,?" element_type="i64" />
   <output><port id="0" precision="I64" names="input_ids"><dim>-1</dim></port></output>
  </layer>
  <layer id="1" name="w" type="Const" version="opset1">
   <data element_type="{weights}" shape="1000, 2, 500" offset="0" size="{size}" />
  </layer>
  <layer id="2" name="w/scale" type="Const" version="opset1">
   <data element_type="f16" shape="1000, 2, 1" offset="9" size="4000" />
  </layer>
  <layer id="3" name="end" type="MatMul" version="opset1">
   <output><port id="0" precision="FP32" names="{output}"><dim>-1</dim></port></output>
  </layer>
 </layers>
 <rt_info>{info}</rt_info>
</net>
"""


def graph(output: str = "logits", weights: str = "u4", size: int = 500_000, info: str = "") -> str:
    return GRAPH.format(output=output, weights=weights, size=size, info=info)


def lay(
    folder: Path,
    config: dict[str, Any] | None,
    names: tuple[str, ...] = TEXT,
    text: str = "",
    files: Mapping[str, Any] | None = None,
) -> Path:
    """A model folder: a graph and weights for each name, config.json, and other files by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.xml").write_text(text or graph())
        (folder / f"{name}.bin").write_bytes(b"weights")
        os.truncate(folder / f"{name}.bin", 1_000_000)
    first: dict[str, Any] = {} if config is None else {"config.json": config}
    for name, content in {**first, **(files or {})}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


SPEECH = ("openvino_encoder_model", "openvino_decoder_model", *TEXT[1:])
IMAGE = ("unet/openvino_model", "text_encoder/openvino_model", "tokenizer/openvino_tokenizer")
VISION = ("openvino_language_model", "openvino_vision_embeddings_model", *TEXT[1:])


@pytest.mark.parametrize(
    ("kind", "architecture", "model_type", "names", "output"),
    [
        ("speech-to-text", "WhisperForConditionalGeneration", "whisper", SPEECH, "logits"),
        ("speech-to-text", "Qwen3ASRForConditionalGeneration", "qwen3_asr", SPEECH, "logits"),
        ("text-to-speech", "SpeechT5ForTextToSpeech", "speecht5", SPEECH, "logits"),
        ("text-to-speech", "KokoroModel", "kokoro", TEXT, "audio"),
        ("rerank", "XLMRobertaForSequenceClassification", "xlm-roberta", TEXT, "logits"),
        ("embed", "XLMRobertaModel", "xlm-roberta", TEXT, "last_hidden_state"),
        ("embed", "Qwen3ForCausalLM", "qwen3", TEXT, "last_hidden_state"),
        ("embed", "NomicBertModel", "nomic_bert", TEXT, "output"),
        ("chat", "Qwen3ForCausalLM", "qwen3", TEXT, "logits"),
        ("chat", "MysteryNet", "mystery", TEXT, "logits"),
        ("chat", "Quasar2ForCausalLM", "quasar", TEXT, "logits"),
        ("chat", "Qwen2VLForConditionalGeneration", "qwen2_vl", VISION, "logits"),
    ],
)
def test_kind_is_detected_from_the_files(
    tmp_path: Path, kind: str, architecture: str, model_type: str, names: tuple[str, ...], output: str
) -> None:
    config = {"architectures": [architecture], "model_type": model_type}
    found = inspect_folder(lay(tmp_path / "m", config, names, graph(output)))
    assert (found.kind, found.details.family, found.details.format) == (kind, model_type, "openvino")
    assert found.details.extra.get("vision", False) == (names is VISION)


def test_image_model_is_detected_by_its_index(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline"}
    found = inspect_folder(lay(tmp_path / "m", None, IMAGE, files={"model_index.json": index}))
    assert (found.kind, found.details.family) == ("text-to-image", "stable-diffusion-xl")
    assert found.details.extra["parameters"] == 2_000_000


def test_sentence_transformers_model_is_an_embedding_model(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    folder = lay(tmp_path / "m", config, files={"modules.json": "[]"})
    assert inspect_folder(folder).kind == "embed"


def test_reranker_that_answers_yes_or_no_is_detected_by_its_name(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert inspect_folder(lay(tmp_path / "Qwen3-Reranker-0.6B", config)).kind == "rerank"


@pytest.mark.parametrize(
    ("files", "text", "level"),
    [
        ({"openvino_config.json": {"dtype": "int8"}}, graph(), "INT8"),
        ({"openvino_config.json": {"quantization_config": {"bits": 4, "sym": False}}}, graph(weights="f16"), "INT4"),
        ({"openvino_config.json": {"dtype": 7, "quantization_config": []}}, graph(), "INT4"),
        (
            {},
            graph(info='<nncf><weight_compression>\n<mode value="int8_asym" />\n</weight_compression></nncf>'),
            "INT8",
        ),
        ({}, graph(info='<nncf><weight_compression>\n<mode value="nf4" />\n</weight_compression></nncf>'), "NF4"),
        ({}, graph(weights="u8"), "INT8"),
        ({}, graph(weights="f16"), "FP16"),
        ({}, graph(weights="f32"), "FP32"),
        ({}, graph(weights="bf16"), "BF16"),
        ({}, "<net>", ""),
    ],
)
def test_quantization_is_detected(tmp_path: Path, files: dict[str, Any], text: str, level: str) -> None:
    assert (
        inspect_folder(lay(tmp_path / "m", {"model_type": "x"}, text=text, files=files)).details.quantization_level
        == level
    )


def test_details_are_read_from_the_config(tmp_path: Path) -> None:
    config = {"model_type": "gemma3", "text_config": {"max_position_embeddings": 32768, "hidden_size": 640}}
    template = "{% if tools %}{{ tools | tojson }}{% endif %}"
    found = inspect_folder(lay(tmp_path / "m", config, files={"chat_template.jinja": template}))
    assert found.details.parameter_size == "1M"
    assert found.details.extra == {
        "parameters": 1_000_000,
        "context_length": 32768,
        "embedding_length": 640,
        "thinking": False,
        "vision": False,
        "tools": True,
    }
    inline = lay(tmp_path / "n", config, files={"tokenizer_config.json": {"chat_template": template}})
    assert inspect_folder(inline).details.extra["tools"]
    beside = lay(tmp_path / "o", config, files={"chat_template.jinja": "plain"})
    assert not inspect_folder(beside).details.extra["tools"]
    (beside / "additional_chat_templates").mkdir()
    (beside / "additional_chat_templates/tool_use.jinja").write_text(template)
    assert inspect_folder(beside).details.extra["tools"]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (["openvino_model.xml", "openvino_model.bin"], "openvino_model.xml is missing"),
        (["openvino_model.bin"], "openvino_model.bin is missing"),
        (["openvino_tokenizer.xml", "openvino_tokenizer.bin"], "openvino_tokenizer.xml is missing"),
        (["openvino_detokenizer.xml", "openvino_detokenizer.bin"], "openvino_detokenizer.xml is missing"),
        (["config.json"], "config.json is missing"),
    ],
)
def test_missing_file_is_named_with_the_remedy(tmp_path: Path, spoil: list[str], text: str) -> None:
    folder = lay(tmp_path / "m", {"model_type": "x"})
    for name in spoil:
        (folder / name).unlink()
    with pytest.raises(PullError) as caught:
        inspect_folder(folder)
    assert text in caught.value.message
    assert "optimum-cli export openvino" in caught.value.message
    assert "hf:OpenVINO/" in caught.value.message


@pytest.mark.parametrize("content", ["", "[]", "{", '"x"', "[" * 100_000, '{"architectures": NaN}'])
def test_invalid_config_is_rejected(tmp_path: Path, content: str) -> None:
    folder = lay(tmp_path / "m", None, files={"config.json": content})
    with pytest.raises(PullError, match="cannot be read"):
        inspect_folder(folder)


@pytest.mark.parametrize("wrong", [None, 7, "text", [1], {"a": 1}])
def test_settings_of_wrong_types_are_ignored(tmp_path: Path, wrong: object) -> None:
    keys = ("architectures", "model_type", "max_position_embeddings", "hidden_size", "text_config")
    found = inspect_folder(
        lay(
            tmp_path / "m",
            dict.fromkeys(keys, wrong),
            files={
                "openvino_config.json": {"dtype": wrong, "quantization_config": wrong},
                "tokenizer_config.json": {"chat_template": wrong},
                "model_index.json": {"_class_name": wrong},
            },
        )
    )
    assert found.kind == "chat"
    assert json.loads(json.dumps(found.details.to_wire())) == found.details.to_wire()


def test_graph_of_one_very_long_line_is_read(tmp_path: Path) -> None:
    folder = lay(tmp_path / "m", {"model_type": "x"}, text="<layer " * 300_000)
    assert inspect_folder(folder).details.extra["parameters"] == 0


def test_needed_files_of_a_model_are_selected() -> None:
    needed = [
        "config.json",
        "chat_template.jinja",
        "merges.txt",
        "openvino_model.bin",
        "openvino_model.xml",
        "openvino_tokenizer.bin",
        "openvino_tokenizer.xml",
        "spm_char.model",
        "speaker_embeddings/one.bin",
        "LICENSE",
    ]
    not_needed = [
        ".gitattributes",
        ".cache/config.json",
        "README.md",
        "modeling_x.py",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "sub/training_args.bin",
        "model.pt",
        "weights.pkl",
        "onnx/model.onnx",
        "onnx/config.json",
        "requirements.txt",
        "image.png",
    ]
    assert choose_files([*not_needed, *needed]) == needed


@pytest.mark.parametrize(
    ("paths", "form"),
    [
        (["config.json", "model.safetensors", "tokenizer.json"], "safetensors"),
        (["model-q4.gguf"], "GGUF"),
        (["config.json", "onnx/model.onnx"], "ONNX"),
        (["config.json", "pytorch_model.bin"], "PyTorch"),
    ],
)
def test_repository_of_another_format_is_rejected(paths: list[str], form: str) -> None:
    with pytest.raises(PullError, match=f"its weights are {form}") as caught:
        choose_files(paths)
    assert "optimum-cli" in caught.value.message


@pytest.mark.promise("S12")
@pytest.mark.parametrize(
    "name", ["openvino_model.bin", "openvino_tokenizer.bin", "config.json", "openvino_model.xml"]
)
def test_git_lfs_pointer_is_reported(tmp_path: Path, name: str) -> None:
    folder = lay(tmp_path / "m", {"model_type": "x"})
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    with pytest.raises(PullError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        inspect_folder(folder)


@pytest.mark.promise("S12")
@pytest.mark.parametrize("name", ["openvino_model", "openvino_tokenizer"])
def test_truncated_weights_are_reported(tmp_path: Path, name: str) -> None:
    folder = lay(tmp_path / "m", {"model_type": "x"})
    os.truncate(folder / f"{name}.bin", 499_999)
    with pytest.raises(PullError, match=rf"{name}\.bin is truncated: {name}\.xml needs 500000 bytes.* it has 499999"):
        inspect_folder(folder)


@pytest.mark.promise("S12")
def test_tokenizer_in_another_format_does_not_suffice() -> None:
    text = ["config.json", "openvino_model.xml", "openvino_model.bin", "tokenizer.json"]
    sight = ["config.json", "openvino_language_model.xml", "openvino_language_model.bin"]
    image = ["model_index.json", "unet/openvino_model.xml", "unet/openvino_model.bin", "tokenizer_2/vocab.json"]
    for paths, missing in (
        (text, "openvino_tokenizer.xml"),
        (sight, "openvino_tokenizer.xml"),
        (image, "tokenizer_2/openvino_tokenizer.xml"),
    ):
        with pytest.raises(PullError, match=f": {missing} is missing"):
            choose_files(paths)
    assert choose_files([*text[:3], "voices/af.bin"])


@pytest.mark.promise("X8")
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.json", "[" * 200 + "1" + "]" * 200, "nested more than 100 deep"),
        ("tokenizer_config.json", '{"a": "' + "x" * (17 << 20) + '"}', "the limit is 16 MiB"),
        ("generation_config.json", '{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
    ],
)
def test_settings_beyond_the_limits_are_rejected_with_the_reason(
    tmp_path: Path, name: str, content: str, why: str
) -> None:
    folder = lay(tmp_path / "m", {"model_type": "x"}, files={name: content})
    with pytest.raises(PullError, match=rf"{name} cannot be read: it .*{why}"):
        inspect_folder(folder)


@pytest.mark.promise("X15")
@pytest.mark.parametrize(
    "data",
    [
        f'shape="{"9" * 5000}" offset="0" size="1"',
        f'shape="1" offset="0" size="{"9" * 5000}"',
        f'shape="{"999999999999, " * 3000}1" offset="0" size="1"',
    ],
)
def test_very_long_numbers_in_a_graph_are_ignored(tmp_path: Path, data: str) -> None:
    text = f'<layer id="1" name="w" type="Const">\n<data element_type="u8" {data}/>\n'
    found = inspect_folder(lay(tmp_path / "m", {"model_type": "x"}, text=text))
    assert json.loads(json.dumps(found.details.to_wire()))


@pytest.mark.promise("S12")
def test_image_model_needs_the_tokenizers_of_its_index(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": [None, None],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    folder = lay(tmp_path / "m", None, IMAGE, files={"model_index.json": index})
    with pytest.raises(PullError, match=r"tokenizer_3/openvino_tokenizer\.xml is missing"):
        inspect_folder(folder)
