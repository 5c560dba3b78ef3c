"""The types of weights, matrix products and the saved student of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrun.errors import InputError
from kdrun.models.attention import check_bits
from kdrun.models.device import find_device

if TYPE_CHECKING:
    import torch

    from kdrun.config.base import DType, Precision
    from kdrun.config.sections import RunConfig

_WEIGHTS: dict[Precision, DType] = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_precision(config: RunConfig) -> None:
    """Refuse types that cannot be combined, whatever the device.

    Raises:
        InputError: names the keys.
    """
    precision, student = config.training.precision, config.model.student_dtype
    if precision == "fp16" and config.training.fsdp:
        raise InputError(
            "training.precision=fp16 is not supported with training.fsdp=true; use bf16 or float32"
        )
    if precision == "fp16" and student not in (None, "float32") and config.lora.rank is None:
        raise InputError(
            f"training.precision=fp16 scales the gradients of float32 weights, but "
            f"model.student_dtype is {student}; remove one of them"
        )


def settle_precision(config: RunConfig, elsewhere: str | None = None) -> RunConfig:
    """Choose the precision for the device, and the types that follow from it.

    Args:
        config: configuration of the run; what it sets is kept.
        elsewhere: kind of the device, ``cpu`` or ``cuda``, of another machine; None for this one.

    Raises:
        InputError: the device lacks the precision.
    """
    here = elsewhere is None
    kind = elsewhere or find_device().type
    has_bf16 = kind != "mps" and (not here or kind != "cuda" or _has_bf16())
    precision = config.training.precision
    if precision is None:
        precision = "bf16" if kind != "cpu" and has_bf16 else "float32"
    elif precision == "bf16" and not has_bf16:
        raise InputError(
            f"training.precision=bf16: this {kind} device computes no bfloat16; use fp16 or float32"
        )
    elif precision == "fp16" and kind == "cpu":
        raise InputError("training.precision=fp16 needs an accelerator; use bf16 or float32")
    half = _WEIGHTS[precision]
    base: DType = "float32" if config.lora.rank is None else half
    student = config.model.student_dtype or base
    saved = config.output.dtype or (student if precision == "float32" else half)
    settled = config.model_copy(
        update={
            "training": config.training.model_copy(update={"precision": precision}),
            "model": config.model.model_copy(
                update={
                    "student_dtype": student,
                    "teacher_dtype": config.model.teacher_dtype or half,
                }
            ),
            "output": config.output.model_copy(update={"dtype": saved}),
        }
    )
    check_bits(settled.model, precision)
    return settled


def _has_bf16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocast_type(config: RunConfig) -> torch.dtype | None:
    """Return the type of matrix products under mixed precision; None without it.

    Args:
        config: after :func:`settle_precision`.
    """
    import torch

    precision = config.training.precision
    if precision is None or precision == "float32":
        return None
    dtype: torch.dtype = getattr(torch, _WEIGHTS[precision])
    return dtype


def notes_on_types(config: RunConfig) -> list[str]:
    """Name the types of a run, unless all are float32, and what training 16-bit weights costs.

    Args:
        config: after :func:`settle_precision`.

    Returns:
        Lines to report.
    """
    model, precision = config.model, config.training.precision
    notes = []
    if precision != "float32":
        adapters = "" if config.lora.rank is None else " below float32 adapters"
        apart = config.lora.rank is not None and not config.lora.merge
        saved = "" if apart else f"; the student is saved in {config.output.dtype}"
        notes.append(
            f"precision: {precision}; weights of the student in "
            f"{config.lora.quantization or model.student_type}{adapters}, of the teacher in "
            f"{model.teacher_quantization or model.teacher_type}{saved}"
        )
    if config.lora.rank is None and model.student_type != "float32":
        notes.append(
            f"model.student_dtype={model.student_type} trains 16-bit weights: updates below half a "
            "unit in the last place are lost, so that the student learns little at usual learning "
            "rates; training.precision=bf16 with float32 weights is as fast"
        )
    return notes
