"""From raw logits to one KD value and one CE value per row: the mathematics, written once.

The plain path differentiates :func:`row_values` with autograd; the chunked path runs the same
function on a chunk and takes its vector-Jacobian product there (:func:`row_gradients`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.numerics import finite_log_probs, kl_terms, log_softmax, restore_infinity
from kdlosses.sources import IDENTITY, Postprocess


@dataclass(frozen=True)
class Program:
    """All that is static about a row's evaluation; equal programs share one compiled graph.

    Attributes:
        loss: the distillation loss, or None for cross-entropy alone.
        student_post: what the student does to its raw logits.
        teacher_post: what the teacher does to its raw logits.
        softened: whether a temperature other than 1 applies to the KD term.
    """

    loss: Loss | None
    student_post: Postprocess = IDENTITY
    teacher_post: Postprocess = IDENTITY
    softened: bool = False


def row_values(
    program: Program,
    raw_student: Tensor,
    raw_teacher: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """KD and CE of each row; infinite values appear as their finite shadows.

    Args:
        program: the static part.
        raw_student: ``[n, V]`` logits before post-processing.
        raw_teacher: ``[n, V]``, or None where the program has no loss.
        labels: ``[n]`` int64 in ``[0, V)``.
        temperature: 0-d; read only where the program is softened.

    Returns:
        KD ``[n]`` (zeros without a loss, without the factor ``T ** temperature_power``) and
        CE ``[n]`` at temperature 1.
    """
    student = program.student_post(raw_student)
    student_log_probs = log_softmax(student)
    # A mask instead of a gather: its gradient is elementwise too and fuses with the rest.
    vocabulary = torch.arange(student.shape[-1], device=student.device)
    is_label = vocabulary == labels.unsqueeze(-1)
    cross_entropy = -torch.where(is_label, finite_log_probs(student_log_probs), 0.0).sum(-1)
    if program.loss is None or raw_teacher is None:
        return torch.zeros_like(cross_entropy), cross_entropy
    teacher = program.teacher_post(raw_teacher)
    if program.softened:
        student_log_probs = log_softmax(student / temperature)
        teacher = teacher / temperature
    divergence = _divergence(
        program.loss,
        finite_log_probs(log_softmax(teacher)),
        finite_log_probs(student_log_probs),
        labels,
    )
    return divergence, cross_entropy


def row_gradients(
    program: Program,
    overwrite: bool,
    raw_student: Tensor,
    raw_teacher: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    kd_weight: Tensor,
    ce_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """KD and CE of each row, and the gradient of their weighted sum.

    Args:
        program: the static part.
        overwrite: write the gradient over ``raw_student`` instead of a new tensor.
        raw_student: ``[n, V]``.
        raw_teacher: ``[n, V]`` or None.
        labels: ``[n]``.
        temperature: 0-d.
        kd_weight: ``[n]`` weight of each row's KD value.
        ce_weight: ``[n]`` weight of each row's CE value.

    Returns:
        KD ``[n]``, CE ``[n]``, and ``d sum(kd_weight * KD + ce_weight * CE) / d raw_student``,
        ``[n, V]`` in the dtype of ``raw_student``.
    """

    def weighted(raw: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        kd, ce = row_values(program, raw, raw_teacher, labels, temperature)
        return kd * kd_weight + ce * ce_weight, (kd, ce)

    total, pull_back, (kd, ce) = torch.func.vjp(  # type: ignore[misc]
        weighted, raw_student, has_aux=True
    )
    (gradient,) = pull_back(torch.ones_like(total))
    if overwrite:
        raw_student.copy_(gradient)
        gradient = raw_student
    return restore_infinity(kd), restore_infinity(ce), gradient


def row_measures(
    program: Program,
    raw_student: Tensor,
    raw_teacher: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a student is judged by, each ``[n]``; arguments as for :func:`row_values`.

    Returns:
        CE, KD (as in :func:`row_values`), forward KL, reverse KL, and 1 where both models find the
        same token most likely. The last three are at temperature 1, and 0 without a teacher.
    """
    kd, ce = row_values(program, raw_student, raw_teacher, labels, temperature)
    if raw_teacher is None:
        return ce, kd, kd, kd, kd
    student = program.student_post(raw_student)
    teacher = program.teacher_post(raw_teacher)
    student_log_probs = finite_log_probs(log_softmax(student))
    teacher_log_probs = finite_log_probs(log_softmax(teacher))
    agreement = student.argmax(-1) == teacher.argmax(-1)
    return (
        ce,
        kd,
        kl_terms(teacher_log_probs, student_log_probs).sum(-1),
        kl_terms(student_log_probs, teacher_log_probs).sum(-1),
        agreement.to(ce.dtype),
    )


def _divergence(loss: Loss, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    if isinstance(loss, Divergence):
        terms = loss.integrand(teacher, student)
        total = terms.sum(-1) if loss.reduction == "sum" else terms.logsumexp(-1)
        return loss.finish(total)
    if isinstance(loss, RowLoss):
        return loss.row(teacher, student, labels)
    raise TypeError(f"{type(loss).__name__}: a loss derives from Divergence or RowLoss")
