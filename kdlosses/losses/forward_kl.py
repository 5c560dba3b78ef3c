"""Forward Kullback-Leibler divergence."""

from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms


class ForwardKL(Divergence):
    """Forward Kullback-Leibler divergence, KL(p || q) = sum p log(p / q).

    The classic objective of distillation: the student is asked to cover all that the teacher
    finds likely. Its gradient with respect to the logits is q - p.

    Not for a student far too small to follow the teacher everywhere: it then spreads its mass
    over tokens that the teacher finds unlikely; reverse or skew divergences concentrate it.

    Infinite where the student rules out a token that the teacher allows.

    Reference: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
    """

    coarse_graining_monotone = True

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """``q - p - p log(q / p)``: KL's terms, made non-negative one by one."""
        return kl_terms(teacher_log_probs, student_log_probs)

    def curvature(self) -> float:
        """1: the unit in which the other losses state theirs."""
        return 1.0
