"""Measures of a student that do not depend on its training loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlosses.compressed import Sampled, TopK
from kdlosses.engine import Chunking, measure_rows
from kdlosses.sources import Source, VocabParallel
from kdlosses.token_loss import TokenLoss

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Measures:
    """Sums over the supervised tokens of a batch, without gradient.

    All are 0-d except ``kd_terms`` and ``calibration``; sums of several batches can be added.

    Attributes:
        num_tokens: number of supervised tokens.
        cross_entropy: cross-entropy of the student.
        calibration: ``[3, 15]``, for :func:`calibration_error`: the number of tokens by the
            probability of the student's most likely token, in bins of equal width; the sum of that
            probability in each bin; and the number of tokens in each bin for which it is the label.
        kd: the distillation loss with its temperature; None without a teacher.
        kd_terms: ``[k]``, the terms of the loss before weighting; None without a teacher.
        forward_kl: KL(teacher || student) at temperature 1; None without a full teacher.
        reverse_kl: KL(student || teacher) at temperature 1; None without a full teacher.
        top1_agreement: number of tokens for which both have the same most likely token; None
            without a full teacher.
        events_forward_kl: against a :class:`TopK`, KL(teacher || student) over its k tokens and
            all others as one event, at its temperature. It is at most the KL over all tokens.
    """

    num_tokens: Tensor
    cross_entropy: Tensor
    calibration: Tensor
    kd: Tensor | None = None
    kd_terms: Tensor | None = None
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    top1_agreement: Tensor | None = None
    events_forward_kl: Tensor | None = None


def measure(
    loss: TokenLoss,
    student: Tensor | Source,
    teacher: Tensor | Source | TopK | None,
    labels: Tensor,
    *,
    compiled: bool | None = None,
) -> Measures:
    """Measure a student on a batch in one chunked pass, without gradients.

    Args:
        loss: the loss, for the KD value, shared vocabulary, ignored label and chunk size.
        student: logits ``[..., V]`` or :class:`Projected`.
        teacher: logits, :class:`Projected` or :class:`TopK`, or None.
        labels: labels aligned with the logits, ``[...]``.
        compiled: as in :func:`kdlosses.get_loss`.

    Raises:
        ValueError: a :class:`Sampled` teacher, whose distribution is unknown, a loss that does not
            support the :class:`TopK`, or a head that is sharded across processes.
    """
    if isinstance(student, VocabParallel):
        raise ValueError("student: measures need the whole head, got VocabParallel")
    batch = loss._batch(student, teacher, labels)
    if isinstance(batch.teacher, Sampled):
        raise ValueError("teacher: measures need its distribution, got Sampled")
    size = None if loss.chunking is None else loss.chunking.size
    # Sums over many tokens need float64, which Apple's GPUs do not support.
    exact = torch.float32 if labels.device.type == "mps" else torch.float64
    kd, ce, student_rows, teacher_rows = (
        values.to(exact) for values in measure_rows(loss._problem(batch), Chunking(size, compiled))
    )
    num_tokens = torch.tensor(len(batch.rows.labels), device=labels.device)
    calibration = _bin(*student_rows.unbind(-1))
    if batch.teacher is None:
        return Measures(num_tokens, ce.sum(), calibration)
    kd = kd.sum(0)
    of_loss = (kd * loss._weighted_factors(batch)).sum(), kd * loss._factors(batch)
    forward, reverse, agreement = teacher_rows.sum(0).unbind()
    if isinstance(batch.teacher, TopK):
        return Measures(num_tokens, ce.sum(), calibration, *of_loss, events_forward_kl=forward)
    return Measures(num_tokens, ce.sum(), calibration, *of_loss, forward, reverse, agreement)


def calibration_error(calibration: Tensor) -> Tensor:
    """Expected calibration error of a student's most likely tokens, from 0 to 1.

    ``sum_b |sum_(i in b) (correct_i - p_i)| / n`` over 15 bins of equal width, where ``p_i`` is the
    probability of the most likely token and ``correct_i`` whether it is the label. It measures
    whether probabilities match frequencies, not whether the student is good: a student that only
    knows base rates can have an error of 0.

    Args:
        calibration: sums over any number of batches, ``[3, 15]``; see :class:`Measures`.

    Returns:
        0-d; NaN without tokens.

    Reference: Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602; Guo et al. 2017, arXiv:1706.04599.
    """
    tokens, confidence, correct = calibration.unbind()
    return (correct - confidence).abs().sum() / tokens.sum()


def _bin(confidence: Tensor, correct: Tensor) -> Tensor:
    """Sums in bins ``(b / 15, (b + 1) / 15]``."""
    index = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    member = torch.nn.functional.one_hot(index, CALIBRATION_BINS).to(confidence.dtype)
    return torch.stack([torch.ones_like(confidence), confidence, correct]) @ member
