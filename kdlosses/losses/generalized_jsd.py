"""Generalized Jensen-Shannon divergence."""

import warnings
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import kl_terms, mix, moves

_CLOSEST = 1e-3  # closest distance to 0 and 1 with normalize for which float32 is enough


class GeneralizedJSD(Divergence):
    """Generalized JSD, beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Bounded by log 2 and finite for any pair of distributions. The convention is that of GKD, TRL
    and Liger; DistiLLM's ``lam`` is 1 - beta. As in TRL, beta 0 means forward KL and beta 1 reverse
    KL, although the value of the formula above falls to 0 towards both ends; ``normalize`` divides
    it by beta (1 - beta), which is continuous with the two KLs. A schedule of beta that starts or
    ends at a KL needs ``normalize``.

    Not recommended with beta close to (but not at) 0 or 1 without ``normalize``, because the value,
    and with it the effective kd_ratio, vanishes.

    Reference: Agarwal et al. 2024 (Generalized Knowledge Distillation), arXiv:2306.13649.
    """

    coarse_graining_monotone = True

    beta: float = Field(0.5, ge=0, le=1, description="the teacher's share in the mixture")
    normalize: bool = Field(False, description="divide by beta (1 - beta)")

    @model_validator(mode="after")
    def _warn_near_the_ends(self) -> Self:
        distance = min(self.beta, 1 - self.beta)
        if self.normalize and 0 < distance < _CLOSEST:
            warnings.warn(
                f"generalized_jsd: beta={self.beta} with normalize=True is too close to 0 or 1 "
                "for float32; use exactly 0 or 1",
                stacklevel=2,
            )
        elif not self.normalize and 0 < distance < 0.02:
            warnings.warn(
                f"generalized_jsd: at beta={self.beta} the value is about {distance:g} times a KL "
                "divergence; use normalize=True, or exactly 0 (forward KL) or 1 (reverse KL)",
                stacklevel=2,
            )
        return self

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The weighted KL terms from each distribution to the mixture."""
        beta = self.beta
        if moves(beta):
            if self.normalize:
                beta = torch.as_tensor(beta).clamp(_CLOSEST, 1 - _CLOSEST)  # type: ignore[assignment]
        elif beta == 0:
            return kl_terms(teacher_log_probs, student_log_probs)
        elif beta == 1:
            return kl_terms(student_log_probs, teacher_log_probs)
        log_mixture, mixture = mix(teacher_log_probs, student_log_probs, beta)
        from_teacher = kl_terms(teacher_log_probs, log_mixture, mixture)
        from_student = kl_terms(student_log_probs, log_mixture, mixture)
        total = beta * from_teacher + (1 - beta) * from_student
        return total / (beta * (1 - beta)) if self.normalize else total

    def curvature(self) -> float:
        """``beta (1 - beta)``, or 1 with ``normalize`` and at the two KLs."""
        product = self.beta * (1 - self.beta)
        return 1.0 if self.normalize or product == 0 else product
