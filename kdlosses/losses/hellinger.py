"""Squared Hellinger distance."""

from torch import Tensor

from kdlosses.divergence import Divergence


class Hellinger(Divergence):
    """Squared Hellinger distance, 1 - sum sqrt(p q) = 1/2 sum (sqrt p - sqrt q)^2.

    Bounded in [0, 1], symmetric, finite and smooth for any pair of distributions; a moderate
    compromise between forward and reverse KL.

    Not recommended if the student starts far from the teacher: the value then saturates at 1, and
    the gradient vanishes.

    Reference: Hellinger 1909, doi:10.1515/crll.1909.136.210.
    """

    coarse_graining_monotone = True

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """``(sqrt p - sqrt q)^2 / 2``, without cancellation near equality."""
        gap = (teacher_log_probs / 2).exp() - (student_log_probs / 2).exp()
        return gap * gap / 2

    def curvature(self) -> float:
        """1/4, a quarter of KL's curvature."""
        return 0.25
