"""Alpha-beta divergence."""

import math
import warnings
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import bounded_exp, choose_near, expm1_minus_x, joint_exp, kl_terms

_TOO_SMALL = 1e-3
_STEEPEST = -1e6


class AlphaBeta(Divergence):
    """Alpha-beta divergence, -1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)].

    alpha weighs how much large ratios q/p count, beta how much confident tokens do: (1, 0) is
    forward KL, (0, 1) reverse KL, (0.5, 0.5) four times the squared Hellinger distance. The limits
    at alpha = 0, beta = 0 and alpha + beta = 0 are taken exactly.

    Not with alpha or beta below 0 where a distribution may have zeros: the value is then infinite.

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
                    f"alpha_beta: {name}={value:g} is too close to 0 for float32; use 0 exactly, "
                    "where the limit is taken",
                    stacklevel=2,
                )
        return self

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The terms; each is non-negative."""
        a, b = self.alpha, self.beta
        total = a + b
        if a == 0 and b == 0:
            return (teacher_log_probs - student_log_probs) ** 2 / 2
        if b == 0:
            return _power_terms(a, teacher_log_probs, student_log_probs)
        if a == 0:
            return _power_terms(b, student_log_probs, teacher_log_probs)
        x = student_log_probs - teacher_log_probs
        if total == 0:
            return expm1_minus_x(-a * x) / (a * a)
        # With 1 - a/total - b/total = 0 the sum is p^total times a difference of exp(x) - 1 - x,
        # which does not cancel near equality if the smaller exponent stands in it.
        weigh, base, small_exponent = (
            (teacher_log_probs, x, b) if abs(b) <= abs(a) else (student_log_probs, -x, a)
        )
        reach = max(abs(small_exponent), abs(total))

        def near(small: Tensor) -> Tensor:
            bracket = small_exponent / total * expm1_minus_x(total * small) - expm1_minus_x(
                small_exponent * small
            )
            return bounded_exp(total * weigh) * bracket / (a * b)

        exponents = (
            total * teacher_log_probs,
            total * student_log_probs,
            a * teacher_log_probs + b * student_log_probs,
        )
        p, q, both = (
            joint_exp(*exponents) if min(a, b) < 0 else (exponent.exp() for exponent in exponents)
        )
        far = ((a / total) * p + (b / total) * q - both) / (a * b)
        return choose_near(base, 0.25 / reach, near, far)

    def curvature(self) -> float | None:
        """1 where alpha + beta is 1; elsewhere tokens are weighed by ``p^(alpha + beta - 1)``."""
        return 1.0 if math.isclose(self.alpha + self.beta, 1) else None


def _power_terms(power: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of KL between the powers ``p^power`` and ``q^power``, divided by ``power^2``."""
    log_p, log_q = power * log_p, power * log_q
    if power > 0:
        return kl_terms(log_p, log_q) / (power * power)
    x = log_q - log_p
    p, q = joint_exp(log_p, log_q)
    far = q - p - p * x.clamp_min(_STEEPEST)  # p is beyond all bounds where the clamp acts

    def near(small: Tensor) -> Tensor:
        return bounded_exp(log_p) * expm1_minus_x(small)

    return choose_near(x, 0.25, near, far) / (power * power)
