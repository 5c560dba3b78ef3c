"""A weight by the place in the answer."""

from pydantic import Field
from torch import Tensor

from kdlosses.token_weight import TokenWeight


class Position(TokenWeight):
    """The position in the answer, w = floor + (1 - floor) 2^(-i / half_life).

    i counts the supervised tokens before this one in its answer. Early tokens decide the rest of an
    answer, and in text that the student wrote the teacher's judgement degrades as the text drifts.

    Not for answers whose last tokens carry the result, such as a number after a calculation, nor
    for plain text, in which i counts from the start of a window.

    Reference: Xie et al. 2026, arXiv:2606.22600, on the bias by position of on-policy distillation;
    their weights follow the accumulated difference instead, which this does not compute.
    """

    supports_top_k = True
    uses_position = True

    half_life: float = Field(64.0, gt=0, description="tokens after which the weight has halved")
    floor: float = Field(0.0, ge=0, le=1, description="weight at the end of a long answer")

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """An exponential decay towards the floor."""
        decay = (-self.position.to(student_log_probs.dtype) / self.half_life).exp2()
        weight: Tensor = self.floor + (1 - self.floor) * decay
        return weight
