"""Opens a language model's pipeline, and computes how many tokens it can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openvino_server.errors import RequestError

if TYPE_CHECKING:
    from openvino_server.pipelines import PipelineSettings

__all__ = ["context_length", "open_pipeline", "pool_tokens", "vocabulary_size"]

_SEEING = ("openvino_vision_embeddings_model.xml", "openvino_language_model.xml")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx", "max_seq_len")
_CPU_BLOCK = 32  # tokens in a block of the KV cache
_GPU_BLOCK = 16


def open_pipeline(settings: PipelineSettings) -> tuple[Any, bool]:
    """The pipeline, and whether its model has vision. Raises RequestError for invalid options."""
    import openvino_genai

    options = settings.options
    properties = settings.properties()
    draft = options.get("draft_models_path")
    if draft:
        device = options.get("draft_device") or settings.device
        properties["draft_model"] = openvino_genai.draft_model(settings.path / str(draft), device)
    sees = any((settings.path / name).exists() for name in _SEEING)
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        settings.path, _scheduler(openvino_genai, options), settings.device, properties
    )
    return pipeline, sees


def _scheduler(genai: Any, options: dict[str, Any]) -> Any:
    """A SchedulerConfig by OVMS's names and defaults."""
    config = genai.SchedulerConfig()
    config.max_num_batched_tokens = int(options.get("max_num_batched_tokens") or 256)
    config.max_num_seqs = int(options.get("max_num_seqs") or 256)
    config.cache_size = int(options.get("cache_size") or 0)
    config.dynamic_split_fuse = bool(options.get("dynamic_split_fuse", True))
    config.enable_prefix_caching = bool(options.get("enable_prefix_caching", True))
    eviction = options.get("cache_eviction_config")
    if eviction:
        config.use_cache_eviction = True
        config.cache_eviction_config = _eviction(genai, eviction)
    return config


def _eviction(genai: Any, given: dict[str, Any]) -> Any:
    names = ("start_size", "recent_size", "max_cache_size", "apply_rotation", "snapkv_window_size")
    values = {name: given[name] for name in names if name in given}
    mode = str(given.get("aggregation_mode", "NORM_SUM"))
    try:
        return genai.CacheEvictionConfig(aggregation_mode=getattr(genai.AggregationMode, mode), **values)
    except (AttributeError, TypeError) as error:
        raise RequestError(f"cache_eviction_config: {error}") from error


def context_length(config: dict[str, Any]) -> int | None:
    """The context length in tokens, from config.json."""
    return _first(config, _LENGTHS)


def vocabulary_size(config: dict[str, Any], tokenizer: Any) -> int:
    """The size of the vocabulary, from config.json, else from the tokenizer."""
    return _first(config, ("vocab_size",)) or max(tokenizer.get_vocab().values()) + 1


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for part in (config, config.get("text_config"), config.get("llm_config"), config.get("language_config")):
        for name in names:
            if isinstance(part, dict) and isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None


def pool_tokens(pipeline: Any, settings: PipelineSettings) -> int | None:
    """The number of tokens that a KV cache of a fixed size holds; None for one that grows.

    The pipeline would never compute a longer prompt, nor any call after it. It does not report the number of blocks;
    the number follows from the share that one block in use takes.
    """
    if not int(settings.options.get("cache_size") or 0):
        return None
    import numpy as np
    import openvino

    config = pipeline.get_config()
    config.max_new_tokens = 2
    config.ignore_eos = True
    handle = pipeline.add_request(0, openvino.Tensor(np.array([[1]], dtype=np.int64)), config)
    pipeline.step()
    usage = float(pipeline.get_metrics().cache_usage)
    handle.cancel()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    block = _CPU_BLOCK if settings.device == "CPU" else _GPU_BLOCK
    return round(100 / usage) * block if usage > 0 else None
