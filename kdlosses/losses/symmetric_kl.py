"""Weighted sum of forward and reverse Kullback-Leibler divergences."""

from pydantic import Field
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms


class SymmetricKL(Divergence):
    """Symmetric KL, w KL(p || q) + (1 - w) KL(q || p) with w = forward_weight.

    A compromise between mode-covering (w near 1) and mode-seeking (w near 0). ``forward_weight`` is
    torchtune's ``sym_kd_ratio``, and 1 - DistiLLM's ``lam``. At 0.5 it is half of Jeffreys'
    divergence.

    Not recommended if either distribution may have exact zeros, because the value is infinite if
    one of the two parts is. The generalized Jensen-Shannon divergence stays finite.

    Reference: Jeffreys 1946, doi:10.1098/rspa.1946.0056.
    """

    coarse_graining_monotone = True

    forward_weight: float = Field(0.5, ge=0, le=1, description="weight of KL(p || q)")

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The weighted non-negative terms of both directions."""
        forward = kl_terms(teacher_log_probs, student_log_probs)
        reverse = kl_terms(student_log_probs, teacher_log_probs)
        return self.forward_weight * forward + (1 - self.forward_weight) * reverse

    def curvature(self) -> float:
        """1 for every weight."""
        return 1.0
