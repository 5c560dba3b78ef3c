"""The context length of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrun.errors import InputError
from kdrun.models.failures import one_clear_line
from kdrun.models.gguf_header import context_length
from kdrun.models.locate import ModelSource


def load_model_config(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """Return the configuration of a model, without reading weights.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoConfig

    base = source.base
    with one_clear_line(source, "model"):
        return AutoConfig.from_pretrained(
            base.path, trust_remote_code=trust_remote_code, **base.options
        )


def context_limit(config: Any) -> int | None:
    """Return the maximum row length of a model; None if it has no limit.

    Args:
        config: configuration of transformers.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    # YaRN and similar methods stretch positions; most configurations state the stretched length.
    if isinstance(rope, dict) and rope.get("original_max_position_embeddings") == limit:
        limit = int(limit * (rope.get("factor") or 1))
    return limit


def check_length(
    source: ModelSource,
    max_length: int,
    trust_remote_code: bool = False,
    key: str = "data.max_length",
) -> None:
    """Refuse rows that are longer than a model's context, without reading weights.

    Raises:
        InputError: the rows are too long; gives the maximum.
    """
    limit = context_of(source, trust_remote_code)
    if limit is not None and max_length > limit:
        cure = "pass --max-length" if key == "data.max_length" else f"set {key} to"
        raise InputError(
            f"{key}={max_length}: the context of {source} is limited to {limit} tokens; "
            f"{cure} {limit} or less"
        )


def context_of(source: ModelSource, trust_remote_code: bool = False) -> int | None:
    """Like `context_limit`, for a model that is not loaded; no weights are read.

    Raises:
        InputError: its configuration cannot be loaded.
    """
    if source.gguf_file is not None and source.is_local:
        return context_length(Path(source.path) / source.gguf_file)
    return context_limit(load_model_config(source, trust_remote_code))
