"""Total variation distance."""

from torch import Tensor

from kdlosses.divergence import Divergence


class TotalVariation(Divergence):
    """Total variation distance, 1/2 sum |p - q|.

    Bounded in [0, 1] and robust against tokens with tiny probabilities: the largest difference in
    probability that the two models assign to any set of tokens.

    Not recommended for the final phase of training: it is not smooth at equality, so its gradient
    does not vanish as the student approaches the teacher. It is locally linear, hence
    temperature_power 1.

    Reference: Wen et al. 2023 (f-DISTILL), arXiv:2307.15190.
    """

    coarse_graining_monotone = True
    temperature_power = 1

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """``|p - q| / 2``."""
        return (teacher_log_probs.exp() - student_log_probs.exp()).abs() / 2
