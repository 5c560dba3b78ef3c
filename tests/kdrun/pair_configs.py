"""A small model, and the configuration of a run with a small pair."""

from __future__ import annotations

from typing import Any

from kdrun.config.load import load_config
from kdrun.config.sections import RunConfig


def config_of(pair: Any, **given: Any) -> RunConfig:
    """The configuration of a pair; keys are written as ``section__key``."""
    overrides = {
        "model.teacher": str(pair.teacher),
        "model.student": str(pair.student),
        "data.train": str(pair.rows),
        "data.max_length": 128,
        **{key.replace("__", "."): value for key, value in given.items()},
    }
    return load_config(None, list(overrides.items()))


def tiny_llama(vocab_size: int, width: int, seed: int, **options: Any) -> Any:
    """A Llama of two layers with random weights."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        **options,
    )
    return transformers.LlamaForCausalLM(config)
