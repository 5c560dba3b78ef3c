"""A weight by the distance of the two distributions."""

from pydantic import Field
from torch import Tensor

from kdlosses.token_weight import TokenWeight


class Disagreement(TokenWeight):
    """The Hellinger distance of teacher and student, w = (1 - sum sqrt(p q))^(power / 2).

    Between 0 (equal) and 1 (no common token): tokens that the student has learnt count little,
    those on which it is confidently wrong count most.

    Not for noisy teachers or labels of another domain, where the largest differences are errors.
    The mean weight falls as the student learns, and with it the size of the steps; see
    ``token_weight.normalize=running``.

    Reference: Xu et al. 2026 (TIP), arXiv:2604.14084, on teacher-student divergence as a second
    axis beside entropy; the Hellinger distance is a bounded choice for it.
    """

    supports_top_k = True

    power: float = Field(1.0, gt=0, description="exponent; larger values separate tokens more")

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The distance to a power; half the sum of squared differences does not cancel."""
        gaps = (teacher_log_probs / 2).exp() - (student_log_probs / 2).exp()
        return ((gaps * gaps).sum(-1) / 2).clamp(0, 1) ** (self.power / 2)
