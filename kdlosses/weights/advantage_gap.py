"""A weight by the difference of the two models on the label."""

from pydantic import Field
from torch import Tensor

from kdlosses.token_weight import TokenWeight


class AdvantageGap(TokenWeight):
    """The advantage gap of the label, w = min(|log p_y - log q_y|, limit) / limit.

    Between 0 and 1. The gap is the signal with which DOPD decides how each token is supervised; its
    choice between losses and between two teachers is not a weight, and not part of this.

    Not for text that neither model would write, where the gap is noise of the tails.

    Reference: Li et al. 2026 (DOPD), arXiv:2606.30626.
    """

    limit: float = Field(2.0, gt=0, description="gap in nats from which the weight is 1")

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The gap relative to its limit."""
        label = labels.unsqueeze(-1)
        gap = teacher_log_probs.gather(-1, label) - student_log_probs.gather(-1, label)
        return (gap.squeeze(-1).abs() / self.limit).clamp_max(1)
