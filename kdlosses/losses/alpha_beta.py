"""Alpha-beta divergence."""

import math
import warnings
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import (
    alpha_beta_terms,
    bounded_exp,
    choose_near,
    expm1_minus_x,
    joint_exp,
    kl_terms,
    moves,
)

_TOO_SMALL = 1e-3
_STEEPEST = -1e6


class AlphaBeta(Divergence):
    """Alpha-beta divergence, -1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)].

    alpha controls the weight of large ratios q/p, and beta the weight of confident tokens: (1, 0)
    is forward KL, (0, 1) reverse KL, and (0.5, 0.5) four times the squared Hellinger distance. The
    limits at alpha = 0, beta = 0 and alpha + beta = 0 are computed exactly.

    Not recommended with alpha or beta below 0 if a distribution may have zeros, because the value
    is then infinite.

    Reference: Wang et al. 2025 (ABKD), arXiv:2505.04560; Cichocki et al. 2011,
    doi:10.3390/e13010134.
    """

    alpha: float = Field(0.5, ge=-4, le=4, description="exponent of the teacher")
    beta: float = Field(0.5, ge=-4, le=4, description="exponent of the student")

    @model_validator(mode="after")
    def _warn_near_the_limits(self) -> Self:
        for name, value in (
            ("alpha", self.alpha),
            ("beta", self.beta),
            ("alpha + beta", self.alpha + self.beta),
        ):
            if 0 < abs(value) < _TOO_SMALL:
                warnings.warn(
                    f"alpha_beta: {name}={value:g} is too close to 0 for float32; use exactly 0, "
                    "which selects the limit",
                    stacklevel=2,
                )
        return self

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The terms, each non-negative."""
        a, b = self.alpha, self.beta
        if moves(a) or moves(b):
            return _moving_terms(a, b, teacher_log_probs, student_log_probs)
        if a == 0 and b == 0:
            return (teacher_log_probs - student_log_probs) ** 2 / 2
        if b == 0:
            return _power_terms(a, teacher_log_probs, student_log_probs)
        if a == 0:
            return _power_terms(b, student_log_probs, teacher_log_probs)
        if a + b == 0:
            return expm1_minus_x(a * (teacher_log_probs - student_log_probs)) / (a * a)
        if a == b > 0:  # a square, without cancellation near equality
            gap = (a * teacher_log_probs).exp() - (a * student_log_probs).exp()
            return gap * gap / (2 * a * a)
        if abs(b) <= abs(a):
            return alpha_beta_terms(
                a, b, a + b, teacher_log_probs, student_log_probs, min(a, b) < 0
            )
        return alpha_beta_terms(b, a, a + b, student_log_probs, teacher_log_probs, min(a, b) < 0)

    def curvature(self) -> float | None:
        """1 if alpha + beta is 1, else None: tokens have weights ``p^(alpha + beta - 1)``."""
        return 1.0 if math.isclose(self.alpha + self.beta, 1) else None


def _moving_terms(alpha: float, beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms for exponents given as 0-d tensors.

    Branches must not depend on their values, so exponents keep a small distance from the limits.
    """
    distance = _TOO_SMALL if log_p.dtype == torch.float32 else _TOO_SMALL**2
    a, b = (_away_from_zero(torch.as_tensor(x), distance) for x in (alpha, beta))
    total = _away_from_zero(a + b, distance / 2)
    b = total - a
    of_student = b.abs() > a.abs()
    large, small = torch.where(of_student, b, a), torch.where(of_student, a, b)
    first = torch.where(of_student, log_q, log_p)
    second = torch.where(of_student, log_p, log_q)
    return alpha_beta_terms(large, small, total, first, second, True)  # type: ignore[arg-type]


def _away_from_zero(x: Tensor, distance: float) -> Tensor:
    return torch.where(x.abs() < distance, torch.where(x < 0, -distance, distance), x)


def _power_terms(power: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of KL between the powers ``p^power`` and ``q^power``, divided by ``power^2``."""
    log_p, log_q = power * log_p, power * log_q
    if power > 0:
        return kl_terms(log_p, log_q) / (power * power)
    x = log_q - log_p
    p, q = joint_exp(log_p, log_q)
    far = q - p - p * x.clamp_min(_STEEPEST)  # the clamp only acts where p is practically infinite
    near = bounded_exp(log_p) * expm1_minus_x(x)
    return choose_near(x, near, far) / (power * power)
