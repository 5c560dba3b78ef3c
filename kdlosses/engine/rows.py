"""The KD values and the CE value of each row, computed from raw logits.

The plain path differentiates :func:`row_values` with autograd; the chunked path runs the same
function on a block of rows and takes its vector-Jacobian product there (:func:`row_gradients`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.engine.views import LOGITS, Aligned, Buckets, View
from kdlosses.numerics import finite_log_probs, kl_terms, log_softmax, restore_infinity
from kdlosses.sources import IDENTITY, Postprocess
from kdlosses.token_weight import TokenWeight
from kdlosses.vocabulary import WHOLE, Vocabulary


@dataclass(frozen=True)
class Program:
    """The static part of a row's evaluation; equal programs share one compiled graph.

    Attributes:
        losses: the distillation losses; empty for cross-entropy alone.
        bound: for each loss, the names of the fields and state variables that are given as
            tensors, because they change between steps.
        student_post: post-processing of the student's raw logits.
        view: how the teacher's rows are read.
        softened: whether a temperature other than 1 applies to the KD terms.
        vocabulary: the tokens of a row.
        weight: factor of each row's KD value, or None.
        weight_bound: names of the weight's state variables, which are given as tensors.
        weighs_ce: whether the weight is also a factor of the CE value.
    """

    losses: tuple[Loss, ...] = ()
    bound: tuple[tuple[str, ...], ...] = ()
    student_post: Postprocess = IDENTITY
    view: View = LOGITS
    softened: bool = False
    vocabulary: Vocabulary = WHOLE
    weight: TokenWeight | None = None
    weight_bound: tuple[str, ...] = ()
    weighs_ce: bool = False

    @property
    def columns(self) -> int:
        """Number of KD values of a row: one for each loss, and last the weight, if any."""
        return len(self.losses) + (self.weight is not None)

    def bind(self, values: tuple[Tensor, ...]) -> list[Loss]:
        """The losses with their changing values, given in the order of ``bound``."""
        rest = iter(values)
        return [
            loss.bind({name: next(rest) for name in names}) if names else loss
            for loss, names in zip(self.losses, self.bound, strict=True)
        ]

    def bind_weight(self, values: tuple[Tensor, ...], positions: tuple[Tensor, ...]) -> TokenWeight:
        """The weight with its state, the last of the values, and the positions of the rows."""
        assert self.weight is not None, "called for programs with a weight"
        first = len(values) - len(self.weight_bound)
        state = dict(zip(self.weight_bound, values[first:], strict=True))
        place = {"position": positions[0]} if positions else {}
        return self.weight.bind({**state, **place})


def row_values(
    program: Program,
    raw_student: Tensor,
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    scalars: tuple[Tensor, ...],
    positions: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """KD and CE of each row; infinite values are represented by large finite ones.

    Args:
        program: the static part.
        raw_student: ``[n, V]`` logits before post-processing.
        teacher: rows of the teacher's stored tensors, as read by the program's view; empty if the
            program has no loss.
        labels: ``[n]`` int64 in ``[0, V)``.
        scalars: 0-d tensors: the temperature, used only if the program is softened, and the values
            of ``program.bound`` and ``program.weight_bound``.
        positions: ``[n]`` places in the answer, for a weight that uses them.

    Returns:
        KD ``[n, k]`` of k losses (without the factor ``T ** temperature_power``) and CE ``[n]`` at
        temperature 1. With a weight, both are multiplied by it (CE only if ``weighs_ce``), and the
        weight itself is a further column of KD.
    """
    student = program.student_post(raw_student)
    vocabulary = program.vocabulary
    student_log_probs = vocabulary.log_softmax(student)
    cross_entropy = -finite_log_probs(vocabulary.pick(student_log_probs, labels))
    if not program.losses:
        return cross_entropy.new_zeros(len(cross_entropy), 0), cross_entropy
    temperature = scalars[0] if program.softened else None
    softened = student_log_probs
    if temperature is not None:
        softened = vocabulary.log_softmax(student / temperature)
    rows = program.view.align(teacher, finite_log_probs(softened), temperature)
    values = [_value(loss, rows, labels, vocabulary) for loss in program.bind(scalars[1:])]
    kd = torch.stack(values, -1)
    if program.weight is None:
        return kd, cross_entropy
    if temperature is not None:
        rows = program.view.align(teacher, finite_log_probs(student_log_probs), None)
    weight = program.bind_weight(scalars, positions).weigh(
        vocabulary.whole(rows.teacher), vocabulary.whole(rows.student), labels
    )
    column = weight.detach().unsqueeze(-1)
    kd = torch.cat([kd * column, column.to(kd.dtype)], -1)
    return kd, cross_entropy * column.squeeze(-1) if program.weighs_ce else cross_entropy


def row_gradients(
    program: Program,
    overwrite: bool,
    raw_student: Tensor,
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    scalars: tuple[Tensor, ...],
    kd_weight: Tensor,
    ce_weight: Tensor,
    positions: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """KD and CE of each row, and the gradient of their weighted sum.

    Args:
        program: the static part.
        overwrite: write the gradient over ``raw_student`` instead of a new tensor.
        raw_student: ``[n, V]``.
        teacher: as in :func:`row_values`.
        labels: ``[n]``.
        scalars: as in :func:`row_values`.
        kd_weight: ``[n, k]`` weight of each row's KD values.
        ce_weight: ``[n]`` weight of each row's CE value.
        positions: as in :func:`row_values`.

    Returns:
        KD ``[n, k]``, CE ``[n]``, and ``d sum(kd_weight * KD + ce_weight * CE) / d raw_student``,
        ``[n, V]`` in the dtype of ``raw_student``.
    """

    def weighted(raw: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        kd, ce = row_values(program, raw, teacher, labels, scalars, positions)
        return (kd * kd_weight).sum(-1) + ce * ce_weight, (kd, ce)

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
    teacher: tuple[Tensor, ...],
    labels: Tensor,
    scalars: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The measures of each row; arguments as in :func:`row_values`.

    Returns:
        KD ``[n, k]``; CE ``[n]``; for the student alone ``[n, 2]``: the probability of its most
        likely token, and 1 if that token is the label; ``[n, 3]``: forward KL, reverse KL, and 1 if
        both models have the same most likely token. The last five are at temperature 1; the last
        three are 0 without a teacher. Against a :class:`kdlosses.TopK`, the two divergences are
        over its events and at its temperature, and the last column has no meaning.
    """
    kd, ce = row_values(program, raw_student, teacher, labels, scalars)
    student_logits = program.student_post(raw_student)
    student = finite_log_probs(log_softmax(student_logits))
    top = student_logits.argmax(-1)
    alone = torch.stack([student.amax(-1).exp(), (top == labels).to(ce.dtype)], -1)
    if not teacher:
        return kd, ce, alone, ce.new_zeros(len(ce), 3)
    if isinstance(program.view, Buckets) and program.softened:
        student = finite_log_probs(log_softmax(student_logits / scalars[0]))
    rows = program.view.align(teacher, student, None)
    both = torch.stack(
        [
            kl_terms(rows.teacher, rows.student).sum(-1),
            kl_terms(rows.student, rows.teacher).sum(-1),
            (top == rows.teacher.argmax(-1)).to(ce.dtype),
        ],
        -1,
    )
    return kd, ce, alone, both


def _value(loss: Loss, rows: Aligned, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
    if isinstance(loss, Divergence):
        terms = loss.integrand(rows.teacher, rows.student)
        if rows.weights is not None:
            terms = terms * rows.weights
        summed = loss.reduction == "sum"
        total = vocabulary.sum(terms) if summed else vocabulary.logsumexp(terms)
        return loss.finish(total)
    if isinstance(loss, RowLoss):
        return loss.row(rows.teacher, rows.student, labels)
    raise TypeError(f"{type(loss).__name__}: a loss derives from Divergence or RowLoss")
