"""OpenVINO's models: folders with a graph (.xml), its weights (.bin), a tokenizer and their settings.

The kind of a model is read from its files in this process: JSON, and a graph's text line by line. Nothing in them is
executed, and weights are not read.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import PullError
from engine_plugin.jsontext import JsonError
from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.info import Inspection, ModelDescription, bundled_samples
from engine_plugin.models.layout import files_of
from engine_plugin.models.store import ModelStore
from engine_plugin.system.files import LFS_POINTER, in_thread, load_json
from engine_plugin.system.sizes import byte_size, parameter_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from engine_plugin.download.remote import FetchPolicy

__all__ = ["choose_files", "inspect_folder", "kind_of", "model_store"]

_HUBS = {"huggingface": "hf", "modelscope": "ms"}

_WANTED = ("*.xml", "*.bin", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.npy", "LICENSE*", "NOTICE*")
_UNWANTED = ("*.safetensors.index.json", "*.bin.index.json", "onnx/*", "README*", "requirements*.txt", "*/README*")
_READERS = {"openvino_model.xml", "openvino_language_model.xml", "openvino_decoder_model.xml"}
"""Graphs that read or write tokens."""
_WRITERS = ("chat", "speech-to-text")
"""Kinds of models that generate text."""
_VOICE_FOLDERS = ("voices", "speaker_embeddings")

_MOST_ELEMENTS = 2**53
_LARGEST_GRAPH = 256 * 1024 * 1024
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates/"
_LARGEST_TEMPLATE = 1024 * 1024
_LONGEST_POINTER = 1024

_CONVERT = (
    "pull a converted one, for example from hf:OpenVINO/…, or convert it with optimum-intel: "
    "optimum-cli export openvino --model NAME FOLDER, then pull the folder"
)


def model_store(root: Path, hub: str, environ: Mapping[str, str], policy: FetchPolicy | None = None) -> ModelStore:
    """The store of OpenVINO models below `root`, with the bundled samples. No I/O beyond the samples' list.

    `hub` is where `owner/name` is pulled from: huggingface or modelscope.
    """

    async def inspect(path: Path) -> Inspection:
        return await in_thread(inspect_folder, path)

    return ModelStore(
        root,
        inspect=inspect,
        choose=choose_files,
        samples=bundled_samples("openvino"),
        policy=policy,
        environ=environ,
        default_hub=_HUBS[hub],
    )


def choose_files(paths: Sequence[str]) -> list[str]:
    """The paths of a folder that OpenVINO needs: no pickles, no programs, no weights in other formats.

    Raises PullError, which names the missing files, unless the folder is an OpenVINO model.
    """
    there = set(paths)
    chosen = [path for path in paths if _is_needed(path, there)]
    missing = _missing(set(chosen))
    if missing:
        raise PullError(f"{missing}{_other_format(there)}: {_CONVERT}.")
    return chosen


def _is_needed(path: str, there: set[str]) -> bool:
    name = path.rpartition("/")[2]
    if any(segment.startswith(".") for segment in path.split("/")):
        return False
    if path.endswith(".bin") and f"{path.removesuffix('.bin')}.xml" not in there:
        return path.split("/", maxsplit=1)[0] in _VOICE_FOLDERS  # any other one is a pickle
    return any(fnmatchcase(name, form) for form in _WANTED) and not any(fnmatchcase(path, form) for form in _UNWANTED)


def _missing(paths: set[str]) -> str:
    """The complaint about the files that a model lacks; "" if it is complete."""
    graphs = sorted(path for path in paths if path.endswith(".xml"))
    if all("tokenizer" in path.rpartition("/")[2] for path in graphs):
        return "not an OpenVINO model: openvino_model.xml is missing"
    needed = [f"{path.removesuffix('.xml')}.bin" for path in graphs]
    needed += [] if "model_index.json" in paths else ["config.json"]
    needed += [f"{folder}openvino_tokenizer.xml" for folder in _tokenizer_folders(paths)]
    return _first_missing(needed, paths)


def _first_missing(needed: Sequence[str], paths: set[str]) -> str:
    missing = next((path for path in needed if path not in paths), "")
    return missing and f"the OpenVINO model is incomplete: {missing} is missing"


def _tokenizer_folders(paths: set[str]) -> list[str]:
    """Where a model needs a tokenizer in OpenVINO's form, for which tokenizer.json is no substitute.

    That is beside graphs that read or write tokens, unless a voice reads phonemes, and in the folders that an image
    model has for tokenizers.
    """
    folders = {f"{path.partition('/')[0]}/" for path in paths if path.startswith("tokenizer") and "/" in path}
    if _READERS & paths and not any(path.startswith("voices/") for path in paths):
        folders.add("")
    return sorted(folders)


def _other_format(there: set[str]) -> str:
    forms = {".safetensors": "safetensors", ".gguf": "GGUF", ".onnx": "ONNX", ".pt": "PyTorch", ".bin": "PyTorch"}
    if any(path.endswith(".xml") for path in there):
        return ""
    found = next((form for end, form in forms.items() if any(path.endswith(end) for path in there)), "")
    return f" (its weights are {found})" if found else ""


@dataclass(slots=True)
class _Graph:
    """The facts that the text of a graph holds."""

    outputs: set[str] = field(default_factory=set)
    parameters: int = 0
    weights: Counter[str] = field(default_factory=Counter)
    """Bytes of constants by their type (u4, f16)."""
    end: int = 0
    """The first byte behind all constants in the weights' file."""
    compression: str = ""
    """NNCF's word for how weights were compressed (int4_asym)."""


_LAYER = re.compile(r'<layer id="\d+" name="([^"]*)" type="([A-Za-z]+)"')
_CONSTANT = re.compile(
    r'<data element_type="([a-z0-9]+)" shape="([0-9, ]{0,200})" '
    r'offset="([0-9]{1,18})" size="([0-9]{1,18})"'
)
_NAMES = re.compile(r' names="([^"]*)"')
_MODE = re.compile(r'<mode value="([a-z0-9_]+)"')
_SCALES = ("/scale", "/zero_point", "/zero_point_convert")


def _read_graph(path: Path) -> _Graph:
    """Read a graph's text line by line, so that malformed text cannot keep it busy."""
    graph = _Graph()
    name = kind = ""
    compressed = False
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(65536):
            if "<layer " in line and (found := _LAYER.search(line)):
                name, kind = found[1], found[2]
            elif kind == "Const" and (found := _CONSTANT.search(line)):
                graph.weights[found[1]] += int(found[4])
                graph.end = max(graph.end, int(found[3]) + int(found[4]))
                if not name.endswith(_SCALES):
                    elements = prod(int(edge) for edge in found[2].replace(",", " ").split())
                    graph.parameters += min(elements, _MOST_ELEMENTS)
            elif kind != "Parameter" and " names=" in line and (found := _NAMES.search(line)):
                graph.outputs.update(found[1].split(","))
            elif "<weight_compression>" in line:
                compressed = True
            elif compressed and (found := _MODE.search(line)):
                graph.compression, compressed = found[1], False
    return graph


class _Files:
    """The content of a model's folder, as far as it is read. PullError names a file that cannot be read."""

    def __init__(self, path: Path, paths: set[str]) -> None:
        self.path = path
        self.paths = paths
        for name in sorted(paths):
            _refuse_pointer(path, name)
            if name.endswith("config.json"):  # also those that only the engine reads
                self._json(name)
        graphs = {name: _checked_graph(path, name) for name in sorted(paths) if name.endswith(".xml")}
        self.graphs = {name: graph for name, graph in graphs.items() if "tokenizer" not in name.rpartition("/")[2]}
        self.config = self._json("config.json")
        self.index = self._json("model_index.json")
        """Of image models."""
        self.openvino = self._json("openvino_config.json")
        """In which optimum records the conversion."""
        self.template = self._template()
        self.model_type = _text(self.config.get("model_type"))
        """The model's family."""
        names = self.config.get("architectures")
        self.architectures = tuple(map(_text, names)) if isinstance(names, list) else ()
        """The names of the classes."""

    @property
    def outputs(self) -> set[str]:
        """The outputs of openvino_model.xml."""
        graph = self.graphs.get("openvino_model.xml")
        return graph.outputs if graph else set()

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON object; {} for a file that is not there or has something else."""
        try:
            found = load_json(self.path / name) if name in self.paths else {}
        except JsonError as error:
            raise PullError(f"{self.path.name}: {name} cannot be read: it {error}.") from None
        return found if isinstance(found, dict) else {}

    def _template(self) -> str:
        written = sorted(name for name in self.paths if name.startswith(_MORE_TEMPLATES) and name.endswith(".jinja"))
        template = ""
        if _TEMPLATE in self.paths:
            written.append(_TEMPLATE)
        else:
            candidates = (
                self._json(name).get("chat_template") for name in ("chat_template.json", "tokenizer_config.json")
            )
            template = str(next(filter(None, candidates), ""))
        for name in written:
            with (self.path / name).open(encoding="utf-8", errors="replace") as file:
                template += file.read(_LARGEST_TEMPLATE)
        return template


def inspect_folder(path: Path) -> Inspection:
    """The kind of a model folder, and its details. Reads all of its text files: call it in a thread.

    Raises PullError for a folder that is not an OpenVINO model.
    """
    try:
        paths = {name for name, _ in files_of(path)}
        missing = _missing(paths)
        if missing:
            raise PullError(f"{path.name}: {missing}{_other_format(paths)}: {_CONVERT}.")
        files = _Files(path, paths)
    except FileNotFoundError as error:
        raise PullError(f"{path.name}: {error.filename} was removed while it was read.") from error
    if not files.config and not files.index:
        raise PullError(f"{path.name}: config.json (or model_index.json) cannot be read: it is not a JSON object.")
    kind, family = kind_of(files), _family(files)
    needed = ["openvino_detokenizer.xml"] if kind in _WRITERS else []
    needed += [
        f"{part}/openvino_tokenizer.xml"
        for part, how in files.index.items()
        if part.startswith("tokenizer") and isinstance(how, list) and any(how)
    ]
    if missing := _first_missing(needed, paths):
        raise PullError(f"{path.name}: {missing}: {_CONVERT}.")
    parameters = sum(graph.parameters for name, graph in files.graphs.items() if "with_past" not in name)
    details = ModelDescription(
        format="openvino",
        family=family,
        families=(family,) if family else (),
        parameter_size=parameter_size(parameters),
        quantization_level=_quantization(files),
        extra=_extra(files, kind, parameters),
    )
    return Inspection(kind, details)


def _refuse_pointer(folder: Path, name: str) -> None:
    """Raise PullError for a small text that Git LFS leaves in the place of a file."""
    if (folder / name).stat().st_size > _LONGEST_POINTER:
        return
    with (folder / name).open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise PullError(
                f"{folder.name}: {name} is a Git LFS pointer, not the file. Run `git lfs pull` in its clone, then "
                "pull the folder again."
            )


def _checked_graph(folder: Path, name: str) -> _Graph:
    """A graph's text. Raises PullError if its weights are missing or truncated."""
    size = (folder / name).stat().st_size
    if size > _LARGEST_GRAPH:
        raise PullError(f"{folder.name}: {name} has {byte_size(size)}; the limit is {byte_size(_LARGEST_GRAPH)}.")
    graph = _read_graph(folder / name)
    weights = f"{name.removesuffix('.xml')}.bin"
    there = (folder / weights).stat().st_size
    if there < graph.end:
        raise PullError(
            f"{folder.name}: {weights} is truncated: {name} needs {graph.end} bytes of it, it has {there}. Fetch "
            "it again."
        )
    return graph


def _text(value: object) -> str:
    return value[:128] if isinstance(value, str) else ""


def _any_in(words: Iterable[str], texts: Iterable[str]) -> bool:
    return any(word in text.lower() for text in texts for word in words)


def kind_of(files: _Files) -> str:
    """The kind of a model: the first whose test matches, else chat."""
    names = (*files.architectures, files.model_type)
    for kind, fits in (
        ("speech-to-text", _is_transcriber(names)),
        ("text-to-speech", _any_in(("texttospeech", "texttowaveform", "speecht5", "kokoro", "parler_tts"), names)),
        ("rerank", _is_reranker(files)),
        ("text-to-image", bool(files.index.get("_class_name")) and "openvino_model.xml" not in files.paths),
        ("embed", _is_embedder(files)),
    ):
        if fits:
            return kind
    return "chat"


def _is_transcriber(names: Sequence[str]) -> bool:
    if _any_in(("whisper", "speechseq2seq", "speechtotext", "speech_to_text"), names):
        return True
    return any(re.search(r"(?:^|_)asr(?:_|$)|ASR(?=[A-Z]|$)", text) for text in names)


def _is_reranker(files: _Files) -> bool:
    """Whether it is a classifier with one class, or a model that answers yes or no, which only its name shows."""
    if any(name.endswith("ForSequenceClassification") for name in files.architectures):
        return True
    return "rerank" in files.path.name.lower() and "openvino_model.xml" in files.paths


def _is_embedder(files: _Files) -> bool:
    if "modules.json" in files.paths:
        return True
    if "openvino_model.xml" not in files.paths or "logits" in files.outputs:
        return False
    if {"last_hidden_state", "sentence_embedding", "token_embeddings"} & files.outputs:
        return True
    return any(name.endswith("Model") for name in files.architectures)


def _family(files: _Files) -> str:
    if files.model_type:
        return files.model_type
    pipeline = _text(files.index.get("_class_name")).removesuffix("Pipeline").removeprefix("OV")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", pipeline).lower()


def _quantization(files: _Files) -> str:
    """How the weights are stored, such as INT4 or FP16: from openvino_config.json, else from the graphs."""
    settings = files.openvino.get("quantization_config")
    settings = settings if isinstance(settings, dict) else {}
    weights = sum((graph.weights for graph in files.graphs.values()), Counter[str]())
    candidates = (
        _text(files.openvino.get("dtype")),
        _text(settings.get("dtype")),
        f"int{settings['bits']}" if isinstance(settings.get("bits"), int) else "",
        *(graph.compression for graph in files.graphs.values()),
        *(weight for weight, _size in weights.most_common(1)),
    )
    word = next(filter(None, candidates), "").partition("_")[0]
    bits = re.search(r"\d+", word)
    if not bits or word.startswith(("bf", "nf", "mxfp", "fp8")):
        return word.upper()
    return ("FP" if word.startswith(("f", "fp")) else "INT") + bits[0]


def _extra(files: _Files, kind: str, parameters: int) -> dict[str, Any]:
    inner = files.config.get("text_config")
    configs = [files.config, inner if isinstance(inner, dict) else {}]
    extra: dict[str, Any] = {"parameters": parameters}
    for name, keys in (
        ("context_length", ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")),
        ("embedding_length", ("hidden_size", "n_embd", "d_model")),
    ):
        values = [config.get(key) for config in configs for key in keys]
        number = next((value for value in values if type(value) is int and value > 0), None)
        if number is not None:
            extra[name] = number
    if kind == "chat":
        extra["vision"] = any("vision_embeddings" in path for path in files.paths)
        found = features_of_template(files.template)
        extra |= {feature: feature in found for feature in ("tools", "thinking")}
    return extra
