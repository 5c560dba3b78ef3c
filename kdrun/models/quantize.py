"""Models whose weights are stored in 8 or 4 bits: what is refused, and the way to store them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from kdrun.errors import InputError
from kdrun.models.nf4 import nf4_bytes, takes_nf4, to_nf4

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kdrun.config.sections import ModelConfig
    from kdrun.config.training_sections import LoraConfig

Kind = Literal["int8", "nf4"]
_KEY = "model.teacher_quantization"
_STUDENT = "lora.quantization"
_PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantization(model: ModelConfig, fsdp: bool) -> None:
    """Refuse a quantised teacher that is not possible, without loading anything.

    Args:
        model: names the teacher.
        fsdp: whether both models are to be sharded.

    Raises:
        InputError: a package is missing, there is no live teacher, or it is to be sharded.
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
    _check(f"{_KEY}={kind}", kind, fsdp)


def check_student_quantization(lora: LoraConfig, fsdp: bool) -> None:
    """Refuse a quantised student that is not possible, without loading anything.

    Args:
        lora: the adapters above it.
        fsdp: whether both models are to be sharded.

    Raises:
        InputError: a package is missing, or the student is to be sharded.
    """
    if lora.quantization is not None:
        _check(f"{_STUDENT}={lora.quantization}", lora.quantization, fsdp)


def _check(given: str, kind: Kind, fsdp: bool) -> None:
    if fsdp:
        raise InputError(
            f"{given}: quantised weights cannot be sharded; remove it, or training.fsdp"
        )
    package = _PACKAGES[kind]
    if find_spec(package) is None:
        raise InputError(
            f"{given} needs {package}, which is not installed: pip install 'kdlosses[quantize]'"
        )


def quantize(model: PreTrainedModel, kind: Kind) -> None:
    """Store the weights of a model's linear layers in fewer bits.

    The output head is unchanged, since losses project with its weight themselves; so are
    embeddings and norms.

    Args:
        model: changed in place. Its weights can be neither trained nor saved any more.
        kind: ``int8`` has one scale per output; ``nf4`` one per 64 weights.
    """
    if kind == "nf4":
        to_nf4(model)
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: _takes_int8(module, head),
    )


def saved_bytes(model: Any, kind: Kind | None) -> int:
    """Return the bytes that :func:`quantize` saves.

    Args:
        model: a model that is not quantised; its tensors need no content.
        kind: None saves nothing.
    """
    if kind is None:
        return 0
    head = model.get_output_embeddings()
    takes = takes_nf4 if kind == "nf4" else _takes_int8
    weights = [module.weight for module in model.modules() if takes(module, head)]
    size = nf4_bytes if kind == "nf4" else _int8_bytes
    return sum(weight.numel() * weight.element_size() - size(weight) for weight in weights)


def _takes_int8(module: Any, head: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and module is not head


def _int8_bytes(weight: torch.Tensor) -> int:
    return weight.numel() + weight.shape[0] * weight.element_size()
