"""Alpha-beta divergence."""

import warnings
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from kdlosses.divergence import Divergence
from kdlosses.numerics import bounded_exp, choose_near, expm1_minus_x, kl_terms

_TOO_SMALL = 1e-3


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
            return kl_terms(a * teacher_log_probs, a * student_log_probs) / (a * a)
        if a == 0:
            return kl_terms(b * student_log_probs, b * teacher_log_probs) / (b * b)
        x = student_log_probs - teacher_log_probs
        if total == 0:
            return expm1_minus_x(-a * x) / (a * a)
        # With 1 - a/total - b/total = 0 the bracket is p^total times a difference of
        # exp(x) - 1 - x, which does not cancel near equality.
        reach = max(abs(b), abs(total))

        def near(small: Tensor) -> Tensor:
            bracket = (b / total) * expm1_minus_x(total * small) - expm1_minus_x(b * small)
            return bounded_exp(total * teacher_log_probs) * bracket / (a * b)

        far = (
            (a / total) * bounded_exp(total * teacher_log_probs)
            + (b / total) * bounded_exp(total * student_log_probs)
            - bounded_exp(a * teacher_log_probs + b * student_log_probs)
        ) / (a * b)
        return choose_near(x, 0.25 / reach, near, far)

    def curvature(self) -> float | None:
        """1 where alpha + beta is 1; elsewhere tokens are weighed by ``p^(alpha + beta - 1)``."""
        return 1.0 if self.alpha + self.beta == 1 else None
