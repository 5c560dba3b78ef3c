"""A teacher whose weights are stored in 8 bits (torchao); it is never trained."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrun.config.sections import ModelConfig

_KEY = "model.teacher_quantization"


def check_quantization(model: ModelConfig, fsdp: bool) -> None:
    """Refuse a quantised teacher that cannot be had; nothing is loaded.

    Args:
        model: names the teacher.
        fsdp: whether both models are to be spread over processes.

    Raises:
        InputError: torchao is not installed, there is no live teacher, or it is to be spread.
    """
    kind = model.teacher_quantization
    if kind is None:
        return
    if model.teacher is None:
        raise InputError(f"{_KEY}={kind} has no effect without a teacher; leave it out")
    if model.teacher_cache is not None:
        raise InputError(
            f"{_KEY}={kind}: a teacher beside its cache has to be the one that was cached, weight "
            "for weight; leave out the one or the other"
        )
    if fsdp:
        raise InputError(
            f"{_KEY}={kind}: such weights are not spread over processes; leave it out, or "
            "training.fsdp"
        )
    if find_spec("torchao") is None:
        raise InputError(
            f"{_KEY}={kind} needs torchao, which is not installed: pip install 'kdlosses[quantize]'"
        )


def quantize(model: PreTrainedModel) -> None:
    """Store the weights of a model's linear layers in 8 bits, with a scale for each output.

    The output head stays as it is, since losses project with its weight themselves; so do
    embeddings and norms.

    Args:
        model: changed in place; it can be evaluated, and neither trained nor saved.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: is_quantized(module, head),
    )


def is_quantized(module: Any, head: Any) -> bool:
    """Whether a module of a model belongs to those that :func:`quantize` changes.

    Args:
        module: any.
        head: the model's output head.
    """
    import torch

    return isinstance(module, torch.nn.Linear) and module is not head
