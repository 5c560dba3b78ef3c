"""Loading causal language models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.base_print import check_base
from kdrun.models.failures import one_clear_line
from kdrun.models.locate import ModelSource
from kdrun.models.merge import describe_unread, merge_adapter
from kdrun.models.nf4 import keep_packing
from kdrun.models.stored import loading_options
from kdrun.models.unread import describe_unread_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    source: ModelSource,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    say: Callable[[str], None] | None = None,
    attention: str | None = None,
    plain: bool = False,
) -> PreTrainedModel:
    """Load a causal language model with all its weights.

    Args:
        source: Its location.
        dtype: The data type of its weights; ``auto`` keeps that of the checkpoint.
        trust_remote_code: Run Python code that comes with the model.
        device: Its device; the CPU by default.
        say: Called with a line for each unused file of the model; None reports nothing.
        attention: The implementation of attention; None lets transformers choose.
        plain: Dequantise a quantised checkpoint, so that its weights can be trained.

    Returns:
        The model in evaluation mode, with adapters merged into its weights. One from a GGUF file is
        dequantised, so that it can be trained and saved like any other.

    Raises:
        InputError: It cannot be loaded, is not a causal language model, lacks weights, is
            quantised by a method that is unknown or cannot be undone, or is not the one that an
            adapter was trained on.
    """
    from transformers import AutoModelForCausalLM

    check_base(source)
    base = source.base
    plain = plain or bool(source.adapters)
    unpacked = (
        _gguf_options() if base.gguf_file else loading_options(base, trust_remote_code, plain)
    )
    options: dict[str, Any] = {**base.options, **unpacked}
    if attention is not None:
        options["attn_implementation"] = attention
    with one_clear_line(base, "model"), warnings.catch_warnings():
        # Of the settings below, only those about dequantising are meant to be used.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    _check_complete(base, info)
    _check_causal(base, model)
    _check_quantization(base, model)
    keep_packing(model)
    tell = say or _tell_nobody
    for note in (
        *describe_unread_files(source),
        *describe_unread(base, sorted(info["unexpected_keys"]), "checkpoint"),
    ):
        tell(note)
    for folder in source.adapters:
        model = merge_adapter(model, folder, tell)
    for note in _settle_tying(source, model):
        tell(note)
    return model.to(device) if device is not None else model


def _tell_nobody(line: str) -> None:
    """Discard a line."""


def _gguf_options() -> dict[str, Any]:
    import transformers

    # Without this a GGUF model counts as quantised, even if its weights were unpacked, and could
    # be neither trained nor saved. Versions without the option always unpack.
    packed_config = getattr(transformers, "GgufConfig", None)
    return {} if packed_config is None else {"quantization_config": packed_config(dequantize=True)}


def _check_complete(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuse weights that transformers has initialised at random."""
    missing = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if missing:
        raise InputError(
            f"{source}: the checkpoint lacks {len(missing)} of the model's weights, such as "
            f"{missing[0]}; it is broken, or not a causal language model"
        )


def _check_causal(source: ModelSource, model: PreTrainedModel) -> None:
    """Refuse bidirectional models, which transformers loads nevertheless."""
    architectures = model.config.architectures or []
    if any(name.endswith("ForMaskedLM") for name in architectures):
        raise InputError(f"{source} is not a causal language model ({architectures[0]})")


def _check_quantization(source: ModelSource, model: PreTrainedModel) -> None:
    """Refuse quantised weights that transformers has not unpacked.

    If it does not know the method, it treats the packed numbers as weights.
    """
    settings = getattr(model.config, "quantization_config", None)
    if settings is None or getattr(model, "hf_quantizer", None) is not None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else type(settings).__name__
    raise InputError(
        f"{source}: its weights are quantised by the method {method!r}, which this version of "
        "transformers does not know; pass a checkpoint that is not quantised, or, if this one is "
        "not, remove quantization_config from its config.json"
    )


def _settle_tying(source: ModelSource, model: PreTrainedModel) -> list[str]:
    """Make the configuration state whether embeddings and head actually are one matrix.

    Otherwise programs that rely on it would drop the head of a saved student. Two matrices with
    equal values are tied again.

    Returns:
        A line if they are two and the configuration says one.
    """
    import torch

    config = model.config.get_text_config()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or table is None or head.weight is table.weight:
        return []
    first, second = table.weight, head.weight
    says_so = getattr(config, "tie_word_embeddings", False)
    if says_so and first.shape == second.shape and torch.equal(first, second):
        head.weight = first
        return []
    names = {n for n, weight in model.named_parameters() if weight is second}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {n: of for n, of in tied.items() if n not in names}
    if not says_so:
        return []
    config.tie_word_embeddings = model.config.tie_word_embeddings = False
    return [
        f"{source}: its head is not tied to its embeddings, although its config.json says so; it "
        "is saved with tie_word_embeddings: false"
    ]


def rebuild(
    model: PreTrainedModel, config: Any, state_dict: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """Create a model of the same class from a configuration and weights, tied as before.

    Args:
        model: Provides the class, the data type and the generation settings.
        config: The configuration of the new model.
        state_dict: All its weights.

    Raises:
        InputError: The weights do not fit the configuration.
    """
    rebuilt, info = type(model).from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=model.dtype,
        output_loading_info=True,
    )
    unfit = sorted([*info["missing_keys"], *info["unexpected_keys"]])
    if unfit or info["mismatched_keys"]:
        raise InputError(
            f"the weights of {type(model).__name__} do not fit its configuration: "
            f"{(unfit or list(info['mismatched_keys']))[0]}"
        )
    rebuilt.generation_config = copy.deepcopy(model.generation_config)
    result: PreTrainedModel = rebuilt.eval()
    return result
