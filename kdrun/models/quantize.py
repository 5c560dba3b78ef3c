"""Teachers whose weights are stored in 8 bits (torchao); they are never trained."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrun.config.sections import ModelConfig

_KEY = "model.teacher_quantization"


def check_quantization(model: ModelConfig, fsdp: bool) -> None:
    """Refuse a quantised teacher that is not possible, without loading anything.

    Args:
        model: names the teacher.
        fsdp: whether both models are to be sharded.

    Raises:
        InputError: torchao is not installed, there is no live teacher, or it is to be sharded.
    """
    kind = model.teacher_quantization
    if kind is None:
        return
    if model.teacher is None:
        raise InputError(f"{_KEY}={kind} has no effect without a teacher; remove it")
    if model.teacher_cache is not None:
        raise InputError(
            f"{_KEY}={kind}: a teacher used with its cache must have exactly the cached weights; "
            "remove one of the two"
        )
    if fsdp:
        raise InputError(
            f"{_KEY}={kind}: quantised weights cannot be sharded; remove it, or training.fsdp"
        )
    if find_spec("torchao") is None:
        raise InputError(
            f"{_KEY}={kind} needs torchao, which is not installed: pip install 'kdlosses[quantize]'"
        )


def quantize(model: PreTrainedModel) -> None:
    """Store the weights of a model's linear layers in 8 bits, with one scale per output.

    The output head is unchanged, since losses project with its weight themselves; so are
    embeddings and norms.

    Args:
        model: changed in place; it can be evaluated, but neither trained nor saved.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: is_quantized(module, head),
    )


def is_quantized(module: Any, head: Any) -> bool:
    """Return whether :func:`quantize` changes a module.

    Args:
        module: any module.
        head: the model's output head.
    """
    import torch

    return isinstance(module, torch.nn.Linear) and module is not head
