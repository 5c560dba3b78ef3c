"""The chunked evaluation: the project's only autograd.Function.

One pass over chunks of rows projects student and teacher, evaluates KD and CE together and forms
the gradients at once, so that no ``[rows, V]`` tensor outlives its chunk and nothing is computed
twice: four matrix products a step. ``backward`` only scales.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdlosses.engine import compiled
from kdlosses.engine.gather import Gradients, Rows
from kdlosses.engine.rows import Program, row_gradients, row_measures, row_values
from kdlosses.numerics import restore_infinity
from kdlosses.sources import Source

_HANDED_OVER = (
    "a chunked loss hands its gradients over in the first backward pass and keeps none: "
    "call backward once, or use the unchunked loss (its name without '_chunked')"
)
_DOUBLE_BACKWARD = (
    "a chunked loss has no second derivative (its gradient is formed in the forward pass): "
    "use the unchunked loss (its name without '_chunked') with create_graph=True"
)


@dataclass(frozen=True)
class Job:
    """One chunked evaluation, without the tensors that autograd must see.

    Attributes:
        program: the static part of the row functions.
        student: the student's source; its tensors are also passed to the function.
        teacher: the teacher's source, or None without a loss.
        kept: indices of the supervised rows, or None for all.
        labels: ``[n]`` labels of the supervised rows.
        temperature: 0-d.
        vocab_size: both sides are cut to this width.
        chunk_rows: rows a chunk.
        compiled: whether the row functions are compiled.
    """

    program: Program
    student: Source
    teacher: Source | None
    kept: Tensor | None
    labels: Tensor
    temperature: Tensor
    vocab_size: int
    chunk_rows: int
    compiled: bool


def chunked_values(
    job: Job, kd_weight: Tensor, ce_weight: Tensor, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum, KD and CE of the supervised rows.

    Args:
        job: the evaluation.
        kd_weight: ``[n]`` weight of each row's KD value.
        ce_weight: ``[n]`` weight of each row's CE value.
        per_row: differentiate the row values (recomputing in backward) instead of the sum.

    Returns:
        The 0-d sum, KD ``[n]``, CE ``[n]``. Gradients flow through the sum, or through the row
        values where ``per_row`` is set, never both.
    """
    recording = torch.is_grad_enabled()
    needed = tuple(recording and tensor.requires_grad for tensor in job.student.tensors)
    arguments = (job, per_row, needed, kd_weight, ce_weight, *job.student.tensors)
    total, kd, ce = _Chunked.apply(*arguments)  # type: ignore[no-untyped-call]
    return total, kd, ce


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        per_row: bool,
        needed: tuple[bool, ...],
        kd_weight: Tensor,
        ce_weight: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients_now = any(needed) and not per_row
        unit = _unit(tensors[0], kd_weight, ce_weight) if gradients_now else None
        kd, ce, gradients = _run(job, kd_weight, ce_weight, needed if gradients_now else None, unit)
        total = weighted_sum(kd, ce, kd_weight, ce_weight)
        ctx.per_row, ctx.needed, ctx.gradients, ctx.unit = per_row, needed, gradients, unit
        ctx.job = job if per_row else None
        if per_row:
            ctx.save_for_backward(*tensors)
            ctx.mark_non_differentiable(total)
        else:
            ctx.save_for_backward(silenced(kd, kd_weight), silenced(ce, ce_weight))
            ctx.mark_non_differentiable(kd, ce)
        ctx.set_materialize_grads(False)
        return total, kd, ce

    @staticmethod
    def backward(
        ctx: Any, total_grad: Tensor | None, kd_grad: Tensor | None, ce_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(_DOUBLE_BACKWARD)
        if ctx.per_row:
            return (None,) * 5 + _per_row_gradients(ctx, kd_grad, ce_grad)
        if total_grad is None:
            return (None,) * (5 + len(ctx.needed))
        kd, ce = ctx.saved_tensors
        weight_grads = [
            values * total_grad if needed else None
            for values, needed in zip((kd, ce), ctx.needs_input_grad[3:5], strict=True)
        ]
        gradients: tuple[Tensor | None, ...] = (None,) * len(ctx.needed)
        if any(ctx.needed):
            if ctx.gradients is None:
                raise RuntimeError(_HANDED_OVER)
            gradients, ctx.gradients = ctx.gradients, None
            factor = total_grad if ctx.unit is None else total_grad * ctx.unit
            if factor.is_cuda or factor.item() != 1.0:  # on CPU a look is cheaper than a pass
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(factor)
        return (None, None, None, *weight_grads, *gradients)


def weighted_sum(kd: Tensor, ce: Tensor, kd_weight: Tensor, ce_weight: Tensor) -> Tensor:
    """``sum(kd_weight * kd + ce_weight * ce)``, where a weight of 0 silences infinities too."""
    kd_sum = (silenced(kd, kd_weight) * kd_weight).sum()
    return kd_sum + (silenced(ce, ce_weight) * ce_weight).sum()


def silenced(values: Tensor, weight: Tensor) -> Tensor:
    """The values with 0 in place of the infinite ones that have weight 0."""
    return torch.where(values.isinf() & (weight == 0), 0.0, values)


def _per_row_gradients(
    ctx: Any, kd_grad: Tensor | None, ce_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors: tuple[Tensor, ...] = ctx.saved_tensors
    rows = len(ctx.job.labels)
    zeros = torch.zeros(rows, dtype=_value_dtype(tensors[0]), device=tensors[0].device)
    kd_weight = zeros if kd_grad is None else kd_grad
    ce_weight = zeros if ce_grad is None else ce_grad
    return _run(ctx.job, kd_weight, ce_weight, ctx.needed, None)[2]


def _run(
    job: Job,
    kd_weight: Tensor,
    ce_weight: Tensor,
    needed: tuple[bool, ...] | None,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """All chunks: KD ``[n]``, CE ``[n]``, and the student's gradients where ``needed`` is given."""
    device = job.student.tensors[0].device
    # Autocast would cast inside the row functions and differ between forward and gradient.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        student, teacher = _sides(job)
        sink = None if needed is None else Gradients(job.student, needed, student)
        total = len(job.labels)
        dtype = _value_dtype(job.student.tensors[0])
        kd = torch.empty(total, dtype=dtype, device=device)
        ce = torch.empty(total, dtype=dtype, device=device)
        if unit is not None:
            kd_weight, ce_weight = kd_weight / unit, ce_weight / unit
        for span in _spans(job):
            inputs = student.inputs(span)
            data = _tile_inputs(job, span, student.raw(inputs), teacher)
            if sink is None:
                values = compiled.run(row_values, (job.program,), data, job.compiled)
                kd[span], ce[span] = restore_infinity(values[0]), restore_infinity(values[1])
            else:
                kd[span], ce[span], gradient = compiled.run(
                    row_gradients,
                    (job.program, student.owns_raw),
                    (*data, kd_weight[span], ce_weight[span]),
                    job.compiled,
                )
                sink.add(span, inputs, gradient)
        return kd, ce, () if sink is None else sink.finish()


def chunked_measures(job: Job) -> Tensor:
    """What :func:`row_measures` gives for each supervised row, without gradients: ``[n, 5]``."""
    values = job.student.tensors[0]
    device = values.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        student, teacher = _sides(job)
        result = torch.empty(len(job.labels), 5, dtype=_value_dtype(values), device=device)
        for span in _spans(job):
            data = _tile_inputs(job, span, student.raw(student.inputs(span)), teacher)
            columns = compiled.run(row_measures, (job.program,), data, job.compiled)
            result[span] = torch.stack([restore_infinity(column) for column in columns], dim=-1)
        return result


def _sides(job: Job) -> tuple[Rows, Rows | None]:
    student = Rows(job.student, job.kept, job.vocab_size, job.chunk_rows)
    if job.teacher is None:
        return student, None
    return student, Rows(job.teacher, job.kept, job.vocab_size, job.chunk_rows)


def _spans(job: Job) -> Iterator[slice]:
    total = len(job.labels)
    for start in range(0, total, job.chunk_rows):
        yield slice(start, min(start + job.chunk_rows, total))


def _tile_inputs(
    job: Job, span: slice, raw_student: Tensor, teacher: Rows | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    raw_teacher = None if teacher is None else teacher.raw(teacher.inputs(span))
    return raw_student, raw_teacher, job.labels[span], job.temperature


def _unit(values: Tensor, kd_weight: Tensor, ce_weight: Tensor) -> Tensor | None:
    """A factor that is left out of float16 gradients until backward.

    One over the token count times a softmax entry underflows in float16; a loss scaler, which
    arrives with ``grad_output``, would come too late.
    """
    if values.dtype != torch.float16 or not len(kd_weight):
        return None
    largest = torch.maximum(kd_weight.abs().max(), ce_weight.abs().max())
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _value_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
