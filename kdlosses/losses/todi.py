"""ToDi: a token-wise mixture of forward and reverse Kullback-Leibler divergence."""

import torch
from torch import Tensor

from kdlosses.divergence import Divergence


class ToDi(Divergence):
    """Token-wise distillation, sum w p log(p / q) + (1 - w) q log(q / p) with w = p / (p + q).

    Forward KL raises tokens that the student underestimates, and reverse KL lowers tokens that it
    overestimates; w, the sigmoid of log(p / q), chooses between them for each token. No gradient
    flows through w. The value is that of KL(p || q) + KL(q || p), but the gradient is not: it has
    1.5 times the strength of KL near equality, where the value has 2 times, so no curvature is
    stated.

    Not recommended if either distribution may have exact zeros, because the value is then infinite.

    Reference: Jung et al. 2025 (ToDi), arXiv:2505.16297.
    """

    coarse_graining_monotone = True
    detached = ("weights",)

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The terms, with the value ``(p - q) log(p / q)``, which cannot be negative."""
        p, q = teacher_log_probs.exp(), student_log_probs.exp()
        x = teacher_log_probs - student_log_probs
        weight = x.detach().sigmoid()
        terms = weight * p * x - (1 - weight) * q * x
        # p - q has the sign of x even where it is rounded.
        gap = torch.where(x.abs() < 1, q * x.clamp(-1, 1).expm1(), p - q)
        return (x * gap).detach() + (terms - terms.detach())
