"""Linear layers whose weights are stored in 4 bits (nf4, by bitsandbytes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_BLOCK = 64  # weights that share a float32 scale
_CODE_BYTES = 16 * 4  # the values of the 16 codes, kept with each layer
_REPACKS = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' layers
_FLAG = "is_loaded_in_4bit"
"""Attribute by which peft and accelerate recognise such a model."""


def takes_nf4(module: Any, head: Any) -> bool:
    """Return whether :func:`to_nf4` changes a module.

    Args:
        module: any module.
        head: the model's output head.
    """
    import torch

    # A subclass may compute something else than a linear map. If rows are not whole blocks, the
    # CPU kernel of bitsandbytes 0.50 reads the scales of other blocks.
    return (
        type(module) is torch.nn.Linear and module is not head and module.in_features % _BLOCK == 0
    )


def nf4_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight in 4 bits, with its scales."""
    elements = weight.numel()
    return -(-elements // 2) + 4 * -(-elements // _BLOCK) + _CODE_BYTES


def to_nf4(model: PreTrainedModel) -> None:
    """Store the weights of a model's linear layers, except the output head, in 4 bits.

    Args:
        model: changed in place; gradients pass through it, but these weights cannot be trained.

    Raises:
        InputError: it has no layer that could be stored so.
    """
    head = model.get_output_embeddings()
    if not _replace(model, lambda module: takes_nf4(module, head), _quantized):
        raise InputError(
            f"nf4: a {model.config.model_type} of these sizes has no linear layer whose input is a "
            f"multiple of {_BLOCK} wide, which 4-bit weights need; leave it unquantised"
        )
    setattr(model, _FLAG, True)


def keep_packing(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, if there are any.

    An evaluation on some CPUs would repack them: their scales would be rounded to bfloat16 for
    good, and gradients would no longer pass through them.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)


def is_nf4(model: Any) -> bool:
    """Return whether a model was changed by :func:`to_nf4`."""
    return bool(getattr(model, _FLAG, False))


def dequantize(model: PreTrainedModel) -> None:
    """Make the layers of a model in 4 bits plain layers again, with the values that they have."""
    import bitsandbytes as bnb
    import torch

    _replace(model, lambda module: isinstance(module, bnb.nn.Linear4bit), _dequantized)
    setattr(model, _FLAG, False)
    for parameter in model.parameters():
        assert parameter.dtype != torch.uint8, "every layer is plain again"


def weights_in(model: Any) -> int:
    """Return the number of weights of a model, also of those that share a byte."""
    return sum(
        parameter.numel() if state is None else state.shape.numel()
        for parameter in model.parameters()
        for state in [getattr(parameter, "quant_state", None)]
    )


def _replace(
    model: PreTrainedModel, chosen: Callable[[Any], bool], make: Callable[[Any], Any]
) -> int:
    """Replace the chosen modules of a model, one of several names once; return how many."""
    made: dict[int, Any] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if chosen(module):
            if id(module) not in made:
                made[id(module)] = make(module)
            model.set_submodule(name, made[id(module)])
    return len(made)


def _quantized(linear: torch.nn.Linear) -> Any:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.detach()
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
    ).to(weight.device)
    made.bias = linear.bias
    keep_packing(made)
    return made.train(linear.training)


def _dequantized(layer: Any) -> torch.nn.Linear:
    import bitsandbytes as bnb
    import torch

    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    made = torch.nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    made.weight = torch.nn.Parameter(values)
    made.bias = layer.bias
    return made
