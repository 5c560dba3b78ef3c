"""Small configurations of any model type: sizes by the names of the fields.

Field names are shared by most configurations of transformers, so that a few patterns suffice.
What they cannot know stands in ``OVERRIDES``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

VOCAB = 64
LAYERS = 2
HIDDEN = 32
HEADS = 4
HEAD_DIM = HIDDEN // HEADS

# The first pattern that a name matches in full gives its size. All heads have the same number,
# because latent attention (MLA) repeats no keys and values.
SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"(.*_)?vocab_size(_.*)?|encoder_hash_byte_group_vocab", VOCAB),
        (r"(n|num|num_hidden|(en|de)coder|num_(en|de)coder)_(layers?|blocks)|depth", LAYERS),
        (r"num_layers_per_stack", LAYERS),
        (r".*(n_heads?|num_heads|(attention|key|value|kv)_heads|query_groups)", HEADS),
        (r".*(head_dim|head_size|headdim|d_head|kv_channels|rotary_dim|dim_head|d_rel)", HEAD_DIM),
        (r".*(experts_per_tok(en)?|moe_k|moe_topk|top_k)", 2),
        (r".*(num_experts|n_routed_experts|num_local_experts)", 4),
        (r"n_groups?|topk_group|num_expert_group|o_groups", 2),
        (r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|feed_forward_size)", 48),
        (r"dff|dim_ff|d_inner|mlp_dim", 48),
        (r".*(_rank|lowrank|per_layer_input)", 16),
        (r".*(hidden_size(_global)?|(emb|embed|embedding|proj)_dim|embedding_size|n_embd)", HIDDEN),
        (r"(d_model|lru_width|mamba_d_ssm|output_channels|out_dim|adapter_in_dim)", HIDDEN),
        (r".*(input_size)", HIDDEN),
        (r".*(d_state|state_size)", 8),
        (r".*max_position.*|n_positions|n_ctx|max_seq_len|context_length", 64),
        (r"model_max_length|max_(target|source)_positions", 64),
        (r".*(sliding_window(_size)?|chunk_size|window_size|window_len)", 16),
        (r".*(block_size|chunk_length)|local_attention", 16),
        (r".*index_topk", 8),
    )
)

ROPE = {"rope_type": "default", "rope_theta": 1e4}


# What the names alone do not tell: sizes that must fit one another, choices without a default.
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"head_dim": 12, "num_attention_heads": 2 * HEADS},
    "nemotron": {"num_key_value_heads": HEADS},
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    # The weights of its second hybrid layer are those of the first.
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


def small_config(model_type: str) -> Any:
    """Return a small configuration of the class that AutoModelForCausalLM builds for a type.

    A composite configuration is reduced to its text part where the class takes that alone.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    wanted = model_class(model_type).config_class
    if wanted in dict(_parts(kind)).values():
        kind = wanted
    return kind(**_shrunk(kind) | OVERRIDES.get(model_type, {}))


def model_class(model_type: str) -> Any:
    """Return the class that AutoModelForCausalLM maps a model type to."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _parts(kind: Any) -> Iterator[tuple[str, Any]]:
    """The configurations inside a composite one, by the names of their fields."""
    from transformers import CONFIG_MAPPING, AutoConfig

    for name, part in (getattr(kind, "sub_configs_defaults", None) or {}).items():
        if isinstance(part, type):
            yield name, part
        else:
            auto = part.config_class is AutoConfig
            yield name, CONFIG_MAPPING[part.model_type] if auto else part.config_class


def _shrunk(kind: Any) -> dict[str, Any]:
    """Arguments of a configuration; what is not given is derived by the configuration itself."""
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        small = _small(field.name, value)
        if small is not None:
            arguments[field.name] = small
    return arguments | {name: _shrunk(part) for name, part in _parts(kind)}


def _small(name: str, value: Any) -> Any:
    """The small value of a field; None leaves the default."""
    if name == "is_decoder":
        return True
    if "dropout" in name and isinstance(value, float):
        return 0.0
    if name == "head_dim" and value is None:  # not every configuration derives it
        return HEAD_DIM
    if isinstance(value, list | tuple) and len(value) > LAYERS:
        return type(value)(value[:LAYERS])
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if name.endswith(("_token_id", "_token_index")):
        return 3 if value >= VOCAB else None
    size = next((size for pattern, size in SIZES if pattern.fullmatch(name)), value)
    return size if size < value else None
