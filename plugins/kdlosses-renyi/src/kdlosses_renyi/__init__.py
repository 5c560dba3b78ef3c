"""The Renyi divergence: three lines of mathematics, and every variant of kdlosses."""

from pydantic import Field, field_validator
from torch import Tensor

from kdlosses import Divergence


class Renyi(Divergence):
    """Renyi divergence, log(sum p^alpha q^(1 - alpha)) / (alpha - 1).

    Tends to KL(p || q) as alpha tends to 1. Larger alpha weighs the tokens that the student
    underestimates most; alpha below 1 forgives them and stays finite where q is 0.

    Not with alpha close to 1 (use forward_kl): numerator and denominator both vanish there, and
    float32 rounds the value by about 2e-7 / |alpha - 1|, which may bring it just below 0.

    Reference: van Erven and Harremoes 2014, doi:10.1109/TIT.2014.2320500.
    """

    reduction = "logsumexp"
    linear_finish = False
    coarse_graining_monotone = True

    alpha: float = Field(2.0, gt=0, lt=100, description="order; 1 is excluded")

    @field_validator("alpha")
    @classmethod
    def _not_one(cls, value: float) -> float:
        if abs(value - 1) < 1e-3:
            raise ValueError("too close to 1, where the divergence is forward_kl")
        return value

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """The logarithms of the terms."""
        return self.alpha * teacher_log_probs + (1 - self.alpha) * student_log_probs

    def finish(self, total: Tensor) -> Tensor:
        """From the logarithm of the sum to the divergence."""
        return total / (self.alpha - 1)

    def curvature(self) -> float:
        """``alpha``, relative to KL."""
        return self.alpha
