"""What a training loop calls: a loss as a module, and its mix with cross-entropy."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kdlosses.divergence import Loss
from kdlosses.engine import (
    Chunking,
    Program,
    Supervised,
    evaluate,
    measure_rows,
    silenced,
    supervised_rows,
)
from kdlosses.sources import Source, as_source

Denominator = int | float | Tensor


class TokenLoss(nn.Module):
    """A distillation loss over the supervised tokens of a batch. Made by :func:`get_loss`.

    The value is ``T ** temperature_power * sum_i w_i D(p_i, q_i) / num_tokens`` over the rows ``i``
    whose label is not ignored, with ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``.

    Args:
        loss: the divergence or row loss.
        chunking: None for the plain evaluation by autograd on full logits.
        temperature: T > 0, softens both sides.
        temperature_scaling: whether the value is multiplied by ``T ** temperature_power``
            (Hinton et al. 2015); TRL, Liger and DistiLLM do not.
        ignore_index: label of the positions that are left out.
        vocab_size: both sides are cut to this many entries before the softmax; by default to the
            smaller of the two heads.
        match_curvature: divide by the loss's curvature, so that near equality it is as strong as
            KL and one ``kd_ratio`` means the same for every loss.

    Raises:
        ValueError: a temperature or vocabulary size that is not positive, or ``match_curvature``
            for a loss that states no curvature.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        chunking: Chunking | None = None,
        temperature: float = 1.0,
        temperature_scaling: bool = True,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        match_curvature: bool = False,
    ) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: must be a positive number, got {temperature}")
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size: must be at least 1, got {vocab_size}")
        self.loss = loss
        self.chunking = chunking
        self.temperature = temperature
        self.temperature_scaling = temperature_scaling
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.scale = 1.0
        if match_curvature:
            curvature = loss.curvature()
            if not curvature:
                raise ValueError(
                    f"match_curvature: {type(loss).__name__} has no curvature to match "
                    f"(it states {curvature})"
                )
            self.scale = 1.0 / curvature

    def extra_repr(self) -> str:
        """Shows the loss and how it is evaluated."""
        how = "plain" if self.chunking is None else "chunked"
        return f"{self.loss!r}, {how}, temperature={self.temperature}"

    def forward(
        self,
        student: Tensor | Source,
        teacher: Tensor | Source,
        labels: Tensor,
        num_tokens: Denominator | None = None,
        *,
        token_weights: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student: logits ``[..., V]`` or :class:`Projected`.
            teacher: likewise; it never receives a gradient.
            labels: ``[...]`` aligned with the logits: ``labels[..., i]`` is the target of
                ``logits[..., i, :]``. Positions with ``ignore_index`` are left out.
            num_tokens: the denominator; by default the supervised tokens of this call. Give the
                number over all micro-batches and ranks when a step is split.
            token_weights: ``[...]`` weight of each position's value.
            reduction: ``"mean"`` or ``"none"``.

        Returns:
            0-d, or with ``reduction="none"`` the values ``[...]``, 0 where ignored (``num_tokens``
            must not be given then). With no supervised token the value is 0 with zero gradients.

        Raises:
            ValueError: on shapes that do not fit together or labels outside the vocabulary.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
        if teacher is None:
            raise TypeError("teacher: expected logits or kdlosses.Projected, got NoneType")
        per_row = reduction == "none"
        if per_row and num_tokens is not None:
            raise ValueError("num_tokens: has no meaning with reduction='none'")
        batch = _Batch.of(self, student, teacher, labels)
        weight = batch.weights(token_weights)
        divisor = 1.0 if per_row else batch.denominator(num_tokens)
        factor = self._factor()
        total, kd, _ = batch.evaluate(
            self, weight * (factor / divisor), torch.zeros_like(weight), per_row
        )
        return batch.rows.spread(silenced(kd, weight) * (factor * weight)) if per_row else total

    def _factor(self) -> float:
        power = self.loss.temperature_power if self.temperature_scaling else 0
        return float(self.scale * self.temperature**power)


@dataclass(frozen=True)
class KDOutput:
    """What :class:`KDObjective` returns.

    Attributes:
        loss: 0-d, the only member with a gradient.
        class_loss: 0-d cross-entropy per supervised token.
        kd_loss: 0-d KD term per supervised token (temperature factor included), None where no
            teacher was given.
        num_tokens: 0-d int64, supervised tokens of this call.
    """

    loss: Tensor
    class_loss: Tensor
    kd_loss: Tensor | None
    num_tokens: Tensor


class KDObjective(nn.Module):
    """``(1 - kd_ratio) * CE + kd_ratio * KD`` over the supervised tokens of a batch.

    CE and KD share the student's projection. CE stays at temperature 1.

    Args:
        loss: from :func:`kdlosses.get_loss`.
        kd_ratio: weight of the KD term in [0, 1]; 0 never evaluates the teacher. It may be
            changed between steps.

    Raises:
        ValueError: ``kd_ratio`` outside [0, 1].
    """

    def __init__(self, loss: TokenLoss, kd_ratio: float = 0.5) -> None:
        super().__init__()
        self.loss = loss
        self.kd_ratio = kd_ratio

    @property
    def kd_ratio(self) -> float:
        """Weight of the KD term."""
        return self._kd_ratio

    @kd_ratio.setter
    def kd_ratio(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"kd_ratio: must lie in [0, 1], got {value}")
        self._kd_ratio = float(value)

    def forward(
        self,
        student: Tensor | Source,
        teacher: Tensor | Source | None,
        labels: Tensor,
        num_tokens: Denominator | None = None,
        *,
        token_weights: Tensor | None = None,
    ) -> KDOutput:
        """The objective of a batch; arguments as for :meth:`TokenLoss.forward`.

        ``teacher`` may be None where ``kd_ratio`` is 0. Where it is given it is not evaluated at
        ``kd_ratio`` 0 and ``kd_loss`` is None.
        """
        if teacher is None and self.kd_ratio > 0:
            raise ValueError(f"teacher: needed at kd_ratio {self.kd_ratio}, got None")
        batch = _Batch.of(self.loss, student, teacher, labels)
        if self.kd_ratio == 0:  # the teacher only had its say on the width of the vocabulary
            batch = replace(batch, teacher=None)
        weight = batch.weights(token_weights)
        divisor = batch.denominator(num_tokens)
        factor = self.loss._factor()
        total, kd, ce = batch.evaluate(
            self.loss,
            weight * (self.kd_ratio * factor / divisor),
            weight * ((1 - self.kd_ratio) / divisor),
            per_row=False,
        )
        weight = weight.detach()
        return KDOutput(
            loss=total,
            class_loss=(silenced(ce, weight) * weight).sum() / divisor,
            kd_loss=(
                None
                if batch.teacher is None
                else (silenced(kd, weight) * weight).sum() * (factor / divisor)
            ),
            num_tokens=torch.tensor(len(batch.rows.labels), device=labels.device),
        )


@dataclass(frozen=True)
class Measures:
    """Sums over the supervised tokens of a batch, all 0-d without gradient.

    Attributes:
        num_tokens: supervised tokens.
        cross_entropy: of the student.
        kd: the distillation loss with its temperature; None without a teacher.
        forward_kl: KL(teacher || student) at temperature 1; None without a teacher.
        reverse_kl: KL(student || teacher) at temperature 1; None without a teacher.
        top1_agreement: tokens on whose most likely continuation both agree; None without a
            teacher.
    """

    num_tokens: Tensor
    cross_entropy: Tensor
    kd: Tensor | None
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    top1_agreement: Tensor | None


def measure(
    loss: TokenLoss,
    student: Tensor | Source,
    teacher: Tensor | Source | None,
    labels: Tensor,
    *,
    compiled: bool | None = None,
) -> Measures:
    """Measure a student on a batch in one chunked pass, whatever the loss; no gradients.

    Args:
        loss: gives the KD value, the cut of the vocabulary, the ignored label and the chunk size.
        student: logits ``[..., V]`` or :class:`Projected`.
        teacher: likewise, or None.
        labels: ``[...]`` aligned with the logits.
        compiled: as for :func:`kdlosses.get_loss`.
    """
    batch = _Batch.of(loss, student, teacher, labels)
    size = None if loss.chunking is None else loss.chunking.size
    rows = measure_rows(
        batch.program(loss),
        batch.student,
        batch.teacher,
        batch.rows,
        batch.temperature(loss),
        batch.vocab_size,
        Chunking(size, compiled),
    )
    ce, kd, forward_kl, reverse_kl, agreement = rows.sum(0, dtype=torch.float64).unbind()
    num_tokens = torch.tensor(len(rows), device=rows.device)
    if teacher is None:
        return Measures(num_tokens, ce, None, None, None, None)
    return Measures(num_tokens, ce, kd * loss._factor(), forward_kl, reverse_kl, agreement)


@dataclass(frozen=True)
class _Batch:
    """A batch whose shapes have been checked."""

    student: Source
    teacher: Source | None
    rows: Supervised
    vocab_size: int

    @classmethod
    def of(
        cls,
        loss: TokenLoss,
        student: Tensor | Source,
        teacher: Tensor | Source | None,
        labels: Tensor,
    ) -> "_Batch":
        sources = [as_source(student, "student")]
        if teacher is not None:
            sources.append(as_source(teacher, "teacher"))
        for name, source in zip(("student", "teacher"), sources, strict=False):
            if source.leading_shape != labels.shape:
                raise ValueError(
                    f"{name}: positions {list(source.leading_shape)} differ from those of labels "
                    f"{list(labels.shape)}"
                )
        vocab_size = min(source.vocab_size for source in sources)
        if loss.vocab_size is not None:
            vocab_size = min(vocab_size, loss.vocab_size)
        rows = supervised_rows(labels, loss.ignore_index, vocab_size)
        return cls(sources[0], sources[1] if teacher is not None else None, rows, vocab_size)

    def weights(self, token_weights: Tensor | None) -> Tensor:
        """Weight ``[n]`` of each supervised row."""
        values = self.student.tensors[0]
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        if token_weights is None:
            return torch.ones(len(self.rows.labels), dtype=dtype, device=values.device)
        if token_weights.shape != self.rows.shape:
            raise ValueError(
                f"token_weights: shape {list(token_weights.shape)} differs from that of labels "
                f"{list(self.rows.shape)}"
            )
        return self.rows.pick(token_weights.to(dtype))

    def denominator(self, num_tokens: Denominator | None) -> Denominator:
        """The denominator, at least 1 so that a batch without supervised tokens gives 0."""
        if num_tokens is None:
            return max(1, len(self.rows.labels))
        if isinstance(num_tokens, Tensor):
            return num_tokens.clamp_min(1)
        return max(1, num_tokens)

    def program(self, loss: TokenLoss) -> Program:
        """The static part of the evaluation."""
        if self.teacher is None:
            return Program(loss=None, student_post=self.student.post)
        return Program(
            loss=loss.loss,
            student_post=self.student.post,
            teacher_post=self.teacher.post,
            softened=loss.temperature != 1.0,
        )

    def temperature(self, loss: TokenLoss) -> Tensor:
        """The temperature as a 0-d tensor of the values' type."""
        values = self.student.tensors[0]
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        return torch.tensor(loss.temperature, device=values.device, dtype=dtype)

    def evaluate(
        self, loss: TokenLoss, kd_weight: Tensor, ce_weight: Tensor, per_row: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum, KD and CE of the supervised rows."""
        return evaluate(
            self.program(loss),
            self.student,
            self.teacher,
            self.rows,
            kd_weight,
            ce_weight,
            self.temperature(loss),
            self.vocab_size,
            loss.chunking,
            per_row,
        )
