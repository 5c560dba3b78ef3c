"""The chunked evaluation, which computes the gradient without autograd.

One pass over chunks of rows projects student and teacher, evaluates KD and CE together and computes
the gradients, so that no ``[rows, V]`` tensor outlives its chunk and nothing is computed twice:
four matrix products per step. ``backward`` only scales the gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdlosses.compressed import TeacherSource
from kdlosses.engine import compiled
from kdlosses.engine.gather import Gradients, Rows, StoredRows
from kdlosses.engine.plan import keep_freed_tiles, spans, tile_rows
from kdlosses.engine.rows import Program, row_gradients, row_measures, row_values
from kdlosses.numerics import restore_infinity
from kdlosses.sources import Logits, Projected, Source

_HANDED_OVER = (
    "a chunked loss releases its gradients in the first backward pass: "
    "call backward once, or use the unchunked loss (its name without '_chunked')"
)
_DOUBLE_BACKWARD = (
    "a chunked loss has no second derivative (its gradient is computed in the forward pass): "
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
        scalars: 0-d, as for :func:`row_values`.
        positions: ``[n]``, as for :func:`row_values`.
        vocab_size: both sides are cut to this width.
        chunk_rows: maximum number of rows to project at once.
        compiled: whether the row functions are compiled.
    """

    program: Program
    student: Source
    teacher: TeacherSource | None
    kept: Tensor | None
    labels: Tensor
    scalars: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    vocab_size: int
    chunk_rows: int
    compiled: bool


def chunked_values(
    job: Job, kd_weight: Tensor, ce_weight: Tensor, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum, KD and CE of the supervised rows.

    Args:
        job: the evaluation.
        kd_weight: ``[n, k]`` weight of each row's KD values.
        ce_weight: ``[n]`` weight of each row's CE value.
        per_row: differentiate the row values (recomputing in backward) instead of the sum.

    Returns:
        The 0-d sum, KD ``[n, k]``, CE ``[n]``. Gradients flow through the sum or, if
        ``per_row`` is set, through the row values instead.
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
            if (
                factor.is_cuda or factor.item() != 1.0
            ):  # on a CPU, reading the factor is cheaper than scaling
                for gradient in gradients:
                    if gradient is not None:
                        gradient.mul_(factor)
        return (None, None, None, *weight_grads, *gradients)


def weighted_sum(kd: Tensor, ce: Tensor, kd_weight: Tensor, ce_weight: Tensor) -> Tensor:
    """``sum(kd_weight * kd + ce_weight * ce)``, where a weight of 0 also removes infinities."""
    kd_sum = (silenced(kd, kd_weight) * kd_weight).sum()
    return kd_sum + (silenced(ce, ce_weight) * ce_weight).sum()


def silenced(values: Tensor, weight: Tensor) -> Tensor:
    """Replace infinite values with weight 0 by 0."""
    return torch.where(values.isinf() & (weight == 0), 0.0, values)


def _per_row_gradients(
    ctx: Any, kd_grad: Tensor | None, ce_grad: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors: tuple[Tensor, ...] = ctx.saved_tensors
    job: Job = ctx.job
    zeros = torch.zeros(len(job.labels), dtype=_value_dtype(tensors[0]), device=tensors[0].device)
    kd_weight = zeros.unsqueeze(-1).expand(-1, job.program.columns)
    return _run(
        job,
        kd_weight if kd_grad is None else kd_grad,
        zeros if ce_grad is None else ce_grad,
        ctx.needed,
        None,
    )[2]


def _run(
    job: Job,
    kd_weight: Tensor,
    ce_weight: Tensor,
    needed: tuple[bool, ...] | None,
    unit: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Run all chunks: KD ``[n, k]``, CE ``[n]`` and, with ``needed``, the student's gradients."""
    values = job.student.tensors[0]
    # Autocast would cast inside the row functions, differently for value and gradient.
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        sides = _Sides(job)
        sink = None if needed is None else Gradients(job.student, needed, sides.student)
        kd = values.new_empty(len(job.labels), job.program.columns, dtype=_value_dtype(values))
        ce = values.new_empty(len(job.labels), dtype=kd.dtype)
        # Detached, because requires_grad would cause another compilation.
        kd_weight, ce_weight = kd_weight.detach(), ce_weight.detach()
        if unit is not None:
            kd_weight, ce_weight = kd_weight / unit, ce_weight / unit
        for chunk in spans(0, len(job.labels), job.chunk_rows):
            inputs, raw, teacher = sides.rows(chunk)
            for tile in sides.tiles(chunk):
                within = slice(tile.start - chunk.start, tile.stop - chunk.start)
                data = (raw[within], _part(teacher, within), job.labels[tile], job.scalars)
                positions = _part(job.positions, tile)
                if sink is None:
                    given = (*data, positions)
                    found = compiled.run(row_values, (job.program,), given, job.compiled)
                    kd[tile], ce[tile] = (restore_infinity(value) for value in found)
                    continue
                kd[tile], ce[tile], gradient = compiled.run(
                    row_gradients,
                    (job.program, sides.student.owns_raw),
                    (*data, kd_weight[tile], ce_weight[tile], positions),
                    job.compiled,
                )
                if not sides.student.owns_raw:
                    sink.add(tile, inputs[within], gradient)
                elif len(gradient) == 1:  # a single row is evaluated in a padded copy
                    raw[within] = gradient
            if sink is not None and sides.student.owns_raw:
                sink.add(chunk, inputs, raw)
        return kd, ce, () if sink is None else sink.finish()


def chunked_measures(job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate :func:`row_measures` for each supervised row, without gradients."""
    values = job.student.tensors[0]
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        sides = _Sides(job)
        found = []
        for chunk in spans(0, len(job.labels), job.chunk_rows):
            _, raw, teacher = sides.rows(chunk)
            for tile in sides.tiles(chunk):
                within = slice(tile.start - chunk.start, tile.stop - chunk.start)
                data = (raw[within], _part(teacher, within), job.labels[tile], job.scalars)
                found.append(compiled.run(row_measures, (job.program,), data, job.compiled))
        if not found:
            kd = values.new_zeros(0, len(job.program.losses), dtype=_value_dtype(values))
            return kd, kd.new_zeros(0), kd.new_zeros(0, 2), kd.new_zeros(0, 3)
        kd, ce, alone, both = (torch.cat(column) for column in zip(*found, strict=True))
        return restore_infinity(kd), restore_infinity(ce), alone, restore_infinity(both)


class _Sides:
    """The supervised rows of student and teacher, by chunk and tile."""

    def __init__(self, job: Job):
        columns = job.student.columns(job.vocab_size)
        self.student = Rows(job.student, job.kept, columns, job.chunk_rows)
        self._teacher: Rows | StoredRows | None = None
        if isinstance(job.teacher, Logits | Projected):
            self._teacher = Rows(job.teacher, job.kept, columns, job.chunk_rows)
        elif job.teacher is not None:
            self._teacher = StoredRows(job.teacher, job.kept)
        rows = tile_rows(job.vocab_size, job.student.tensors[0].device)
        if rows is not None:
            keep_freed_tiles()
        self._tile_rows = rows or job.chunk_rows

    def rows(self, chunk: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The student's inputs and raw logits, and the teacher's tensors."""
        inputs = self.student.inputs(chunk)
        teacher = () if self._teacher is None else self._teacher.tensors(chunk)
        return inputs, self.student.raw(inputs), teacher

    def tiles(self, chunk: slice) -> Iterator[slice]:
        """The parts of a chunk that the row functions process at once."""
        return spans(chunk.start, chunk.stop, self._tile_rows)


def _part(tensors: tuple[Tensor, ...], within: slice) -> tuple[Tensor, ...]:
    return tuple(tensor[within] for tensor in tensors)


def _unit(values: Tensor, kd_weight: Tensor, ce_weight: Tensor) -> Tensor | None:
    """A factor that float16 gradients omit until backward.

    One over the token count times a softmax entry underflows in float16, and the factor of a loss
    scaler is only known in ``backward``.
    """
    if values.dtype != torch.float16 or not len(kd_weight):
        return None
    largest = torch.cat([kd_weight.reshape(-1), ce_weight]).abs().max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _value_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
