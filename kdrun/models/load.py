"""Loading causal language models."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.adapters import merge_adapter
from kdrun.models.failures import one_clear_line
from kdrun.models.locate import ModelSource

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    source: ModelSource,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal language model with all its weights.

    Args:
        source: Where it is.
        dtype: The type of its weights; ``auto`` keeps that of the checkpoint.
        trust_remote_code: Run Python code that comes with the model.
        device: Where to put it; the CPU by default.

    Returns:
        The model in evaluation mode, adapters merged into its weights. One from a GGUF file is
        dequantised, and is then a model like any other: it can be trained and saved.

    Raises:
        InputError: It cannot be loaded, is not a causal language model, or misses weights.
    """
    from transformers import AutoModelForCausalLM

    base = source.base
    options = _gguf_options(base.gguf_file) if base.gguf_file else {}
    with one_clear_line(base, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    _check_complete(base, info)
    _check_causal(base, model)
    for folder in source.adapters:
        model = merge_adapter(model, folder)
    return model.to(device) if device is not None else model


def _gguf_options(gguf_file: str) -> dict[str, Any]:
    import transformers

    # Without this a GGUF model counts as quantised, even where its weights had to be unpacked:
    # it could be neither trained nor saved. Versions that lack the option always unpack.
    packed_config = getattr(transformers, "GgufConfig", None)
    options: dict[str, Any] = {"gguf_file": gguf_file}
    if packed_config is not None:
        options["quantization_config"] = packed_config(dequantize=True)
    return options


def _check_complete(source: ModelSource, info: dict[str, Any]) -> None:
    """Refuse weights that transformers has filled in at random."""
    missing = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if missing:
        raise InputError(
            f"{source}: the checkpoint lacks {len(missing)} of the model's weights, such as "
            f"{missing[0]}; it is broken, or not that of a causal language model"
        )


def _check_causal(source: ModelSource, model: PreTrainedModel) -> None:
    """Refuse models that read a text in both directions, which transformers loads all the same."""
    architectures = model.config.architectures or []
    if any(name.endswith("ForMaskedLM") for name in architectures):
        raise InputError(f"{source} is not a causal language model ({architectures[0]})")


def rebuild(
    model: PreTrainedModel, config: Any, state_dict: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """Make a model of the same class from a configuration and weights, tied as they were.

    Args:
        model: Gives the class, the data type and the generation settings.
        config: The configuration of the new model.
        state_dict: Its weights, all of them.

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
