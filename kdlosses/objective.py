"""The training objective: a loss mixed with cross-entropy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlosses.batch import Denominator
from kdlosses.compressed import TeacherSource
from kdlosses.engine import (
    evaluate,
    silenced,
)
from kdlosses.schedules import Schedule
from kdlosses.sources import Source
from kdlosses.token_loss import TokenLoss


@dataclass(frozen=True)
class KDOutput:
    """The output of an objective.

    Attributes:
        loss: 0-d, the only attribute with a gradient.
        class_loss: 0-d, cross-entropy per supervised token.
        kd_loss: 0-d, KD term per supervised token (including the temperature factor); None without
            a teacher.
        kd_terms: ``[k]``, the terms of a weighted sum before weighting; for one loss of weight 1 it
            contains ``kd_loss``. None without a teacher.
        num_tokens: 0-d int64, number of supervised tokens of this call.
    """

    loss: Tensor
    class_loss: Tensor
    kd_loss: Tensor | None
    kd_terms: Tensor | None
    num_tokens: Tensor


class KDObjective(nn.Module):
    """``(1 - kd_ratio) * CE + kd_ratio * KD`` over the supervised tokens of a batch.

    CE and KD share the student's projection. CE always uses temperature 1.

    Args:
        loss: a loss from :func:`kdlosses.get_loss`.
        kd_ratio: weight of the KD term in [0, 1], or its schedule; with 0 the teacher is never
            evaluated. A number may be changed between steps.

    Raises:
        ValueError: ``kd_ratio`` outside [0, 1].
    """

    def __init__(self, loss: TokenLoss, kd_ratio: float | Schedule = 0.5) -> None:
        super().__init__()
        self.loss = loss
        self._schedule = None if isinstance(kd_ratio, float | int) else kd_ratio
        if self._schedule is not None:
            for value in self._schedule.extremes:
                self.kd_ratio = value  # validates it
            kd_ratio = self._schedule(0.0)
        self.kd_ratio = kd_ratio  # type: ignore[assignment]

    @property
    def kd_ratio(self) -> float:
        """Weight of the KD term."""
        return self._kd_ratio

    @kd_ratio.setter
    def kd_ratio(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"kd_ratio: must be in [0, 1], got {value}")
        self._kd_ratio = float(value)

    @property
    def needs_teacher(self) -> bool:
        """Whether ``kd_ratio`` is, or will be, above 0."""
        return max(self._schedule.extremes if self._schedule else (self.kd_ratio,)) > 0

    @property
    def moving_values(self) -> dict[str, float]:
        """The current values of scheduled parameters and state variables, by name."""
        ratio = {"kd_ratio": self.kd_ratio} if self._schedule else {}
        return {**ratio, **self.loss.moving_values}

    def advance(self, progress: float, term_values: Sequence[float] | None = None) -> None:
        """Advance schedules and state; see :meth:`TokenLoss.advance`.

        A step with ``kd_ratio`` 0 has no term values and leaves the state unchanged.
        """
        if self.kd_ratio == 0:
            self.move(progress)
            return
        self.loss.advance(progress, term_values)
        self._move_ratio(progress)

    def move(self, progress: float) -> None:
        """Advance schedules only, for a skipped step or an extended training.

        Args:
            progress: the completed share of the training, in [0, 1].
        """
        self.loss._move(progress, None)
        self._move_ratio(progress)

    def get_extra_state(self) -> dict[str, Any]:
        """The progress of a schedule of ``kd_ratio``; part of ``state_dict``."""
        return {"progress": self.loss.progress}

    def set_extra_state(self, state: Any) -> None:
        """Restore the state from :meth:`get_extra_state`."""
        self._move_ratio(state["progress"])

    def forward(
        self,
        student: Tensor | Source,
        teacher: Tensor | TeacherSource | None,
        labels: Tensor,
        num_tokens: Denominator | None = None,
        *,
        token_weights: Tensor | None = None,
    ) -> KDOutput:
        """Compute the objective of a batch; arguments as in :meth:`TokenLoss.forward`.

        ``teacher`` may be None if ``kd_ratio`` is 0. If it is given, it is not evaluated, and
        ``kd_loss`` is None.
        """
        if teacher is None and self.kd_ratio > 0:
            raise ValueError(f"teacher: required if kd_ratio is {self.kd_ratio}, got None")
        batch = self.loss._batch(student, teacher, labels)
        weight = batch.weights(token_weights)
        divisor = batch.denominator(num_tokens)
        # With ratio 0 the teacher only determines the shared vocabulary.
        problem = self.loss._problem(batch, with_teacher=self.kd_ratio > 0)
        count = len(problem.program.losses)
        factors = self.loss._weighted_factors(batch)[:count]
        total, kd, ce = evaluate(
            problem,
            weight.unsqueeze(-1) * (self.kd_ratio * factors / divisor),
            weight * ((1 - self.kd_ratio) / divisor),
            self.loss.chunking,
        )
        weight = weight.detach()
        column = weight.unsqueeze(-1)
        sums = (silenced(kd, column) * column).sum(0) / divisor
        return KDOutput(
            loss=total,
            class_loss=(silenced(ce, weight) * weight).sum() / divisor,
            kd_loss=(sums * factors).sum() if count else None,
            kd_terms=sums * self.loss._factors(batch) if count else None,
            num_tokens=torch.tensor(len(batch.rows.labels), device=labels.device),
        )

    def _move_ratio(self, progress: float) -> None:
        if self._schedule is not None:
            self.kd_ratio = self._schedule(progress)
