"""A weight by the teacher's probability of the label."""

from pydantic import Field
from torch import Tensor

from kdlosses.token_weight import TokenWeight


class Confidence(TokenWeight):
    """The teacher's confidence in the label, w = p_y^power.

    Tokens of the training text that the teacher itself would hardly write count less.

    Not for text that the teacher wrote greedily, where the weight is near 1 throughout, or if the
    labels are right where the teacher is wrong.

    Reference: Huang et al. 2025 (SelecTKD), arXiv:2510.24021, which selects the tokens that the
    teacher approves; this is a smooth form of it.
    """

    power: float = Field(1.0, gt=0, description="exponent; larger values separate tokens more")

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The probability of the label, to a power."""
        label = teacher_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (self.power * label).exp()
