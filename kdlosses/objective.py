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
from kdlosses.token_weight import TokenWeight, TokenWeighting


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
        weight_sums: ``[3]``: sum of the token weights, before normalisation, number of tokens with
            a weight above 0, and number of tokens weighted; None without a token weight.
    """

    loss: Tensor
    class_loss: Tensor
    kd_loss: Tensor | None
    kd_terms: Tensor | None
    num_tokens: Tensor
    weight_sums: Tensor | None = None


class KDObjective(nn.Module):
    """``(1 - kd_ratio) * CE + kd_ratio * KD`` over the supervised tokens of a batch.

    CE and KD share the student's projection. CE always uses temperature 1.

    Args:
        loss: a loss from :func:`kdlosses.get_loss`.
        kd_ratio: weight of the KD term in [0, 1], or its schedule; with 0 the teacher is never
            evaluated. A number may be changed between steps.
        token_weight: factor of each supervised token's KD value, or with
            :class:`kdlosses.TokenWeighting` also of its CE value and with a running mean. Reported
            losses include it. In steps with ratio 0 nothing is weighted.

    Raises:
        ValueError: ``kd_ratio`` outside [0, 1].
    """

    def __init__(
        self,
        loss: TokenLoss,
        kd_ratio: float | Schedule = 0.5,
        token_weight: TokenWeight | TokenWeighting | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.weighting = (
            TokenWeighting(token_weight) if isinstance(token_weight, TokenWeight) else token_weight
        )
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
        weight = {} if self.weighting is None else self.weighting.named_values
        return {**ratio, **self.loss.moving_values, **weight}

    @property
    def needs_weight_sums(self) -> bool:
        """Whether :meth:`advance` needs the sums of the token weights."""
        return self.weighting is not None and self.weighting.moves

    def advance(
        self,
        progress: float,
        term_values: Sequence[float] | None = None,
        weight_sums: Sequence[float] | None = None,
    ) -> None:
        """Advance schedules and state; see :meth:`TokenLoss.advance`.

        A step with ``kd_ratio`` 0 has no term values and leaves the state unchanged.

        Args:
            progress: the completed share of the training, in [0, 1].
            term_values: as for :meth:`TokenLoss.advance`.
            weight_sums: :attr:`KDOutput.weight_sums`, summed over the micro-batches and ranks of
                the step; only needed by a token weight with state or running mean.

        Raises:
            ValueError: a progress outside [0, 1], or missing values.
        """
        if self.kd_ratio == 0:
            self.move(progress)
            return
        if self.needs_weight_sums and weight_sums is None:
            raise ValueError("weight_sums: this token weight needs its sums over the step")
        self.loss.advance(progress, term_values)
        if self.weighting is not None and weight_sums is not None and weight_sums[2] > 0:
            total, positive, tokens = weight_sums
            self.weighting.advance(progress, total / tokens, positive / tokens)
        self._move_ratio(progress)

    def move(self, progress: float) -> None:
        """Advance schedules only, for a skipped step or an extended training.

        Args:
            progress: the completed share of the training, in [0, 1].
        """
        self.loss._move(progress, None)
        self._move_ratio(progress)

    def get_extra_state(self) -> dict[str, Any]:
        """Progress of a schedule of ``kd_ratio``, token weight's state; part of ``state_dict``."""
        weight = {} if self.weighting is None else {"token_weight": self.weighting.state()}
        return {"progress": self.loss.progress, **weight}

    def set_extra_state(self, state: Any) -> None:
        """Restore the state from :meth:`get_extra_state`.

        Raises:
            ValueError: the state belongs to another token weight.
        """
        if self.weighting is not None and "token_weight" in state:
            self.weighting.restore(state["token_weight"])
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
        weighting = self.weighting
        problem = self.loss._problem(batch, self.kd_ratio > 0, weighting)
        program = problem.program
        count = len(program.losses)
        factors = self.loss._weighted_factors(batch)[:count]
        # The running mean of token weights divides all values that are weighted.
        normal = 1.0 if weighting is None or program.weight is None else weighting.factor
        ce_normal = normal if program.weighs_ce else 1.0
        column = weight.unsqueeze(-1)
        kd_weight = column * (self.kd_ratio * normal * factors / divisor)
        if program.weight is not None:  # the last column is reported, and not part of the loss
            kd_weight = torch.cat([kd_weight, torch.zeros_like(column)], -1)
        total, kd, ce = evaluate(
            problem,
            kd_weight,
            weight * ((1 - self.kd_ratio) * ce_normal / divisor),
            self.loss.chunking,
        )
        weight_sums = None
        if program.weight is not None:
            kd, found = kd[:, :-1] * normal, kd[:, -1]
            ones = torch.ones_like(found)
            weight_sums = torch.stack([found, (found > 0).to(found.dtype), ones]).sum(-1)
        weight, ce = weight.detach(), ce * ce_normal
        column = weight.unsqueeze(-1)
        sums = (silenced(kd, column) * column).sum(0) / divisor
        return KDOutput(
            loss=total,
            class_loss=(silenced(ce, weight) * weight).sum() / divisor,
            kd_loss=(sums * factors).sum() if count else None,
            kd_terms=sums * self.loss._factors(batch) if count else None,
            num_tokens=torch.tensor(len(batch.rows.labels), device=labels.device),
            weight_sums=weight_sums,
        )

    def _move_ratio(self, progress: float) -> None:
        if self._schedule is not None:
            self.kd_ratio = self._schedule(progress)
