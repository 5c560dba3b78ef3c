"""Cosine distance of hidden states."""

from torch import Tensor
from torch.nn.functional import normalize

from kdlosses.hidden_loss import FeatureLoss


class HiddenCosine(FeatureLoss):
    """Cosine distance of hidden states, 1 - sum_i t_i s_i / (|t| |s|).

    t is the teacher's state of a token, s the student's. In [0, 2]. Only directions count, so a
    student with another scale of its residual stream is not penalised.

    Not useful if the norm of a state matters, since no gradient changes it. A few dimensions with
    very large values, which many language models have, determine most of a cosine; the gradient of
    the others is then small.

    Reference: Sanh et al. 2019, arXiv:1910.01108.
    """

    scale_invariant = True

    def row(self, teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        """Return half the squared distance of the directions, exactly 0 for equal states."""
        gap = normalize(teacher_hidden, dim=-1) - normalize(student_hidden, dim=-1)
        return gap.square().sum(-1) / 2
