"""Evaluate a loss over the supervised rows of a batch, plain or chunked."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdlosses.compressed import TeacherSource
from kdlosses.engine.chunked import (
    Job,
    chunked_measures,
    chunked_values,
    silenced,
    weighted_sum,
)
from kdlosses.engine.gather import StoredRows
from kdlosses.engine.plan import Chunking, automatic_chunk_size, compiles
from kdlosses.engine.rows import Program, row_values
from kdlosses.engine.views import refusal, view_of, weight_refusal
from kdlosses.numerics import restore_infinity
from kdlosses.sources import Logits, Projected, Source, VocabParallel
from kdlosses.vocabulary import copied

__all__ = [
    "Chunking",
    "Problem",
    "Program",
    "Supervised",
    "evaluate",
    "measure_rows",
    "refusal",
    "silenced",
    "supervised_rows",
    "view_of",
    "weight_refusal",
]


@dataclass(frozen=True)
class Supervised:
    """The rows whose label is not ignored.

    Attributes:
        kept: indices in the flattened batch, ``[n]``, or None if every row is supervised.
        labels: labels of the rows, ``[n]``.
        shape: the leading shape of the batch.
    """

    kept: Tensor | None
    labels: Tensor
    shape: torch.Size

    def pick(self, values: Tensor) -> Tensor:
        """The supervised entries ``[n]`` of a tensor of the batch's shape."""
        flat = values.reshape(-1)
        return flat if self.kept is None else flat.index_select(0, self.kept)

    @property
    def positions(self) -> Tensor:
        """The number of supervised tokens before each row in its answer, ``[n]`` int64.

        An answer is a run of supervised positions along the last axis of the batch.
        """
        length = self.shape[-1] if self.shape else 1
        flat = torch.arange(self.shape.numel(), device=self.labels.device)
        kept = flat if self.kept is None else self.kept
        places = torch.arange(len(kept), device=kept.device)
        begins = kept % length == 0
        begins[1:] |= kept[1:] != kept[:-1] + 1
        begins[:1] = True
        return places - torch.where(begins, places, 0).cummax(0).values

    def spread(self, values: Tensor) -> Tensor:
        """Scatter values ``[n]`` to the batch's shape, with 0 for ignored rows."""
        if self.kept is None:
            return values.view(self.shape)
        full = values.new_zeros(self.shape.numel())
        return full.index_copy(0, self.kept, values).view(self.shape)


def supervised_rows(labels: Tensor, ignore_index: int, vocab_size: int) -> Supervised:
    """Find the supervised rows; other rows are dropped before the projection.

    Raises:
        ValueError: a label is outside the vocabulary.
    """
    flat = labels.reshape(-1)
    kept = (flat != ignore_index).nonzero().squeeze(1)
    chosen = flat.index_select(0, kept)
    if len(kept):
        lowest, highest = torch.stack([chosen.min(), chosen.max()]).tolist()
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"labels: token {wrong} is outside the vocabulary of {vocab_size} "
                f"(ignored positions have the label {ignore_index})"
            )
    everything = len(kept) == len(flat)
    return Supervised(None if everything else kept, chosen, labels.shape)


@dataclass(frozen=True)
class Problem:
    """The input of an evaluation.

    Attributes:
        program: the static part of the computation.
        student: the student's logits.
        teacher: the teacher, detached; None without a loss.
        rows: the supervised rows.
        scalars: 0-d tensors: the temperature and the values of ``program.bound`` and
            ``program.weight_bound``.
        vocab_size: both sides are cut to this width before the softmax.
        positions: ``[n]`` places of the rows in their answers, for a weight that uses them.
    """

    program: Program
    student: Source
    teacher: TeacherSource | None
    rows: Supervised
    scalars: tuple[Tensor, ...]
    vocab_size: int
    positions: tuple[Tensor, ...] = ()


def evaluate(
    problem: Problem,
    kd_weight: Tensor,
    ce_weight: Tensor,
    chunking: Chunking | None,
    per_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum, KD and CE of the supervised rows.

    Args:
        problem: the input.
        kd_weight: ``[n, k]`` weight of each row's values of the k losses, and a further column
            of zeros if the program has a token weight.
        ce_weight: ``[n]`` weight of each row's CE value.
        chunking: how to chunk, or None for the plain evaluation by autograd.
        per_row: whether gradients flow through the row values instead of the sum.

    Returns:
        The 0-d sum, KD ``[n, k]`` and CE ``[n]``.
    """
    if chunking is not None:
        return chunked_values(_job(problem, chunking), kd_weight, ce_weight, per_row)
    rows = problem.rows
    device_type = problem.student.tensors[0].device.type
    with torch.autocast(device_type, enabled=False):
        raw_student = _plain_raw(problem.student, rows, problem.vocab_size)
        with torch.no_grad():
            teacher = _plain_teacher(problem)
        given = (rows.labels, problem.scalars, problem.positions)
        kd, ce = row_values(problem.program, raw_student, teacher, *given)
        total = weighted_sum(kd, ce, kd_weight, ce_weight)
        kd, ce = restore_infinity(kd), restore_infinity(ce)
    if per_row:
        return total.detach(), kd, ce
    kd, ce = kd.detach(), ce.detach()
    exact = weighted_sum(kd, ce, kd_weight.detach(), ce_weight.detach())
    return total + torch.where(exact.isinf(), exact, 0.0), kd, ce


def measure_rows(problem: Problem, chunking: Chunking) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate :func:`kdlosses.engine.rows.row_measures` for every supervised row."""
    return chunked_measures(_job(problem, chunking))


def _job(problem: Problem, chunking: Chunking) -> Job:
    student, vocab_size = problem.student, problem.vocab_size
    head_width = student.width if isinstance(student, Projected) else 0
    size = chunking.size or automatic_chunk_size(vocab_size, head_width, student.tensors[0].device)
    return Job(
        program=problem.program,
        student=student,
        teacher=problem.teacher,
        kept=problem.rows.kept,
        labels=problem.rows.labels,
        scalars=problem.scalars,
        positions=problem.positions,
        vocab_size=vocab_size,
        chunk_rows=max(1, min(size, len(problem.rows.labels))),
        compiled=_compiled(problem, chunking),
    )


def _plain_teacher(problem: Problem) -> tuple[Tensor, ...]:
    teacher, rows = problem.teacher, problem.rows
    if teacher is None:
        return ()
    if isinstance(teacher, Logits | Projected):
        return (_plain_raw(teacher, rows, problem.vocab_size),)
    return StoredRows(teacher, rows.kept).tensors(slice(None))


def _plain_raw(source: Source, rows: Supervised, vocab_size: int) -> Tensor:
    values = source.tensors[0].reshape(-1, source.width)
    if rows.kept is not None:
        values = values.index_select(0, rows.kept)
    if not isinstance(source, Projected):
        return values[:, :vocab_size]
    if isinstance(source, VocabParallel):
        values, vocab_size = copied(values, source.group), source.columns(vocab_size)
    bias = None if source.bias is None else source.bias[:vocab_size].to(values.dtype)
    return functional.linear(values, source.weight[:vocab_size].to(values.dtype), bias)


def _compiled(problem: Problem, chunking: Chunking) -> bool:
    if isinstance(problem.student, VocabParallel):
        return False  # communication between processes cannot be compiled
    return compiles(problem.vocab_size) if chunking.compiled is None else chunking.compiled
