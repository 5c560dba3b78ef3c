"""The implementation of attention in both models, checked before a model is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.config.sections import ModelConfig

_ALWAYS_THERE = ("sdpa", "eager", "flex_attention")
# The module and the package of each; transformers can also fetch a kernel of the hub instead.
_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
_KERNELS = "kernels"


def check_attention(model: ModelConfig) -> None:
    """Refuse an implementation that is unknown or whose package is missing.

    Whether a model's class supports it is checked when the model is created, before its weights are
    read.

    Args:
        model: names the implementation.

    Raises:
        InputError: gives the cure.
    """
    name = model.attention
    if name is None or name in _ALWAYS_THERE:
        return
    key = f"model.attention={name}"
    if name in _FLASH:
        module, package = _FLASH[name]
        if find_spec(module) is None and find_spec(_KERNELS) is None:
            raise InputError(
                f"{key} needs the package {package}, which is not installed: pip install "
                f"{package}, or choose sdpa"
            )
    elif "/" in name:
        if find_spec(_KERNELS) is None:
            raise InputError(
                f"{key} is a kernel on the hub, which needs the package kernels: pip install "
                "kernels, or choose sdpa"
            )
    elif name not in _registered():
        raise InputError(f"{key}: unknown; choose {', '.join((*_ALWAYS_THERE, *_FLASH))}")


def check_bits(model: ModelConfig, precision: str) -> None:
    """Refuse an implementation that computes in 16 bits only where a model does not.

    Args:
        model: names the implementation and the types of the weights, which are settled.
        precision: of training.

    Raises:
        InputError: gives the cure.
    """
    whole = "float32" in (model.teacher_type, model.student_type if precision == "float32" else "")
    if model.attention in _FLASH and whole:
        raise InputError(
            f"model.attention={model.attention} computes in 16 bits only: set "
            "training.precision=bf16, without model.teacher_dtype=float32, or choose sdpa"
        )


def check_trains(attention: str | None) -> None:
    """Refuse an implementation that has no backward pass on this machine.

    Raises:
        InputError: there is no accelerator, and it needs one.
    """
    import torch

    if attention == "flex_attention" and not torch.accelerator.is_available():
        raise InputError(
            "model.attention=flex_attention has no backward pass on a CPU, so it cannot train the "
            "student here; choose sdpa or eager"
        )


def _registered() -> set[str]:
    """Return what plugins have added; implementations of a server's paged cache are left out."""
    from transformers import AttentionInterface

    return {name for name in AttentionInterface().valid_keys() if "|" not in name}
