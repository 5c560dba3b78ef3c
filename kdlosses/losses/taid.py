"""Temporally adaptive interpolated distillation."""

import math
from collections.abc import Mapping
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from kdlosses.definition import state_variable
from kdlosses.divergence import RowLoss
from kdlosses.numerics import finite_log_probs, kl_terms, log_softmax


class TAID(RowLoss):
    """TAID, KL(p_t || q) with p_t = softmax((1 - t) z_q + t z_p) and t growing in training.

    The target moves from near the student to the teacher, so that it is always within reach of a
    small student. No gradient flows through the student's part of p_t. After each step
    m <- 0.99 m + 0.01 (l_before - l) / l_before with l the loss of the step, and
    t <- min(t_end, max(t_start + (t_end - t_start) progress, t + 5e-4 sigmoid(m) (1 - t))).

    Not suitable for comparing the training losses of two runs, because the target changes from step
    to step, or for ``match_curvature``, because the strength depends on t. Rows in which teacher
    and student have no possible token in common have no target and no meaningful value.

    Reference: Shing et al. 2025 (TAID), arXiv:2501.16937.
    """

    detached = ("student_in_target",)
    supports_top_k = True

    t_start: float = Field(0.4, ge=0, le=1, description="the teacher's share at the start")
    t_end: float = Field(1.0, ge=0, le=1, description="the teacher's largest share")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.t_start > self.t_end:
            raise ValueError(f"t_start ({self.t_start:g}) must not exceed t_end ({self.t_end:g})")
        return self

    @state_variable
    def t(self) -> float:
        """The teacher's share in the target's logits."""
        return self.t_start

    @state_variable
    def momentum(self) -> float:
        """Running mean of the relative change of the loss."""
        return 0.0

    @state_variable
    def previous(self) -> float:
        """The loss of the previous step; infinite before the first step."""
        return math.inf

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Forward KL from the interpolated target; log-probabilities are used as logits."""
        mixed = (1 - self.t) * student_log_probs.detach() + self.t * teacher_log_probs
        target = finite_log_probs(log_softmax(mixed))
        return kl_terms(target, student_log_probs).sum(-1)

    def next_state(
        self, state: Mapping[str, float], value: float, progress: float
    ) -> dict[str, float]:
        """Increase the share with progress, and faster while the loss decreases."""
        previous, momentum, t = state["previous"], state["momentum"], state["t"]
        if not math.isfinite(previous):  # the first step has no previous loss
            return {**state, "previous": value}
        change = (previous - value) / previous if previous else 0.0
        momentum = 0.99 * momentum + 0.01 * change
        linear = self.t_start + (self.t_end - self.t_start) * progress
        # An overflow-safe sigmoid: momentum may be -1e8 after a step with a loss of almost 0.
        step = 5e-4 * (1 + math.tanh(momentum / 2)) / 2 * (1 - t)
        return {
            "t": min(self.t_end, max(linear, t + step)),
            "momentum": momentum,
            "previous": value,
        }
