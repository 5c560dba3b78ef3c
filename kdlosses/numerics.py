"""Numerically safe building blocks for losses.

The log-probabilities passed to a loss are finite: an impossible token has ``LOG_ZERO`` (-1e30), not
``-inf``, so that ``0 * log 0`` is 0 in value and gradient and losses need no guards against NaN.
"""

import math

import torch
from torch import Tensor

LOG_ZERO = -1e30
"""Represents log 0, large enough that any positive weight on it counts as infinite."""

INFINITE = 1e12
"""A row value beyond this represents an infinite one (see :data:`LOG_ZERO`).

A mass as small as 1e-18 on an impossible token still counts as infinite.
"""

_SMALL = 0.25
HIGHEST_EXPONENT = 40.0
"""Its exponential, 2e17, represents infinity; sums and slopes of it are finite in float32."""

_TERMS = {torch.float32: 7, torch.float64: 13}


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last axis, in float32 (float64 stays float64).

    ``(x - max) - log(sum(exp(x - max)))``: subtracting the maximum first keeps the rounding error
    at the size of the differences, not of the logits. Entries of ``-inf`` stay ``-inf``, and their
    gradient is 0.

    Args:
        logits: ``[..., V]``, any floating-point type, with at least one finite entry per row.

    Returns:
        ``[..., V]`` normalised log-probabilities.
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = x - x.amax(-1, keepdim=True).detach()
    return z - z.exp().sum(-1, keepdim=True).log()


def finite_log_probs(log_probs: Tensor) -> Tensor:
    """Replace ``-inf`` by :data:`LOG_ZERO`; the gradient of replaced entries is 0."""
    return log_probs.clamp_min(LOG_ZERO)


def restore_infinity(values: Tensor) -> Tensor:
    """Convert row values that can only result from :data:`LOG_ZERO` back to infinities.

    The gradient is passed through unchanged, because that of the finite value still has the right
    direction.
    """
    infinity = torch.full_like(values, math.inf).copysign(values.detach())
    return values + torch.where(values.detach().abs() > INFINITE, infinity, 0.0)


def exp_remainder(x: Tensor) -> Tensor:
    """``exp(x) - 1 - x`` as ``x^2/2! + x^3/3! + ...``, for ``|x| < 0.25`` only.

    For use in :func:`choose_near`, which takes no gradient through it.
    """
    highest = _TERMS[x.dtype]
    total = torch.full_like(x, 1.0 / math.factorial(highest))
    for power in range(highest - 1, 1, -1):
        total = total * x + 1.0 / math.factorial(power)
    return total * x * x


def expm1_minus_x(x: Tensor) -> Tensor:
    """``exp(x) - 1 - x``, non-negative and accurate near 0, where the plain form cancels.

    The exponent is limited to :data:`HIGHEST_EXPONENT`.
    """
    x = x.clamp_max(HIGHEST_EXPONENT)
    return choose_near(x, exp_remainder(x), x.exp() - 1 - x)


def bounded_exp(x: Tensor) -> Tensor:
    """``exp(x)``, limited to the value that represents infinity.

    Otherwise, terms with negative powers of a probability of 0 would overflow, and their gradients
    would be NaN.
    """
    return x.clamp_max(HIGHEST_EXPONENT).exp()


def joint_exp(*exponents: Tensor) -> list[Tensor]:
    """``exp`` of each exponent, all scaled down if the largest would represent infinity.

    A combination of them thus keeps its sign, unlike with separate limits.
    """
    highest = exponents[0].detach()
    for x in exponents[1:]:
        highest = torch.maximum(highest, x.detach())
    beyond = highest > HIGHEST_EXPONENT
    return [torch.where(beyond, x - highest + HIGHEST_EXPONENT, x).exp() for x in exponents]


def moves(parameter: object) -> bool:
    """Whether a parameter of a loss is given as a 0-d tensor, because a schedule changes it.

    Branches must then not depend on its value, since one compiled graph is used for all values.
    """
    return isinstance(parameter, Tensor)


def choose_near(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """The value of ``near`` where ``|x| < 0.25``, else of ``far``; the gradient is that of ``far``.

    Both compute the same function. ``near`` is a series; ``far`` cancels near 0, but its derivative
    does not, and is cheaper than that of the series by a tenth of the time of the row functions.
    """
    value = torch.where(x.abs() < _SMALL, near, far).detach()
    return value + (far - far.detach())


def kl_terms(log_p: Tensor, log_q: Tensor, q: Tensor | None = None) -> Tensor:
    """The terms ``q - p - p (log q - log p)``, whose sum over the vocabulary is ``KL(p || q)``.

    For normalised rows the extra ``q - p`` sums to 0. It makes every term non-negative, so
    cancellation between large terms cannot make a small divergence negative. For small
    differences the terms are computed as ``p (exp(x) - 1 - x)`` with ``x = log q - log p``.

    Args:
        log_p: finite log-probabilities of the weighting distribution, ``[..., V]``.
        log_q: finite log-probabilities of the other distribution, ``[..., V]``.
        q: the exponentials of ``log_q`` if available (:func:`mix` returns both).

    Returns:
        ``[..., V]``, each entry at least 0.
    """
    x = log_q - log_p
    p = log_p.exp()
    far = (log_q.exp() if q is None else q) - p - p * x
    return choose_near(x, exp_remainder(x) * p, far)


def alpha_beta_terms(
    large: float, small: float, total: float, log_p: Tensor, log_q: Tensor, bounded: bool
) -> Tensor:
    """The terms of the alpha-beta divergence, away from its limits, each non-negative.

    With 1 - large/total - small/total = 0 the sum is p^total times a difference of exp(x) - 1 - x,
    which does not cancel near equality because it uses the smaller exponent.

    Args:
        large: the exponent with the larger absolute value.
        small: the other exponent.
        total: their sum.
        log_p: finite log-probabilities of the side with the larger exponent.
        log_q: those of the other side.
        bounded: limit powers to the value that represents infinity; needed if an exponent is
            negative.
    """
    exponents = (total * log_p, total * log_q, large * log_p + small * log_q)
    p, q, both = joint_exp(*exponents) if bounded else [x.exp() for x in exponents]
    weigh = bounded_exp(total * log_p) if bounded else p
    x = log_q - log_p
    bracket = small / total * exp_remainder(total * x) - exp_remainder(small * x)
    near = weigh * bracket / (large * small)
    far = ((large / total) * p + (small / total) * q - both) / (large * small)
    # |total| is at most twice the larger exponent and may be below the smaller one.
    reach = abs(small) + abs(total)
    return choose_near(reach * x, near, far)


def mix(log_a: Tensor, log_b: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor]:
    """The mixture ``weight * a + (1 - weight) * b`` of two distributions, elementwise.

    It is computed from probabilities: an entry that underflows has no mass in any divergence. If
    both are 0, its logarithm is about -87 (-708 in float64), and any weight on it is 0. A weight of
    exactly 0 or 1 returns one side unchanged, which may underflow alone.

    Returns:
        The logarithm and the probabilities of the mixture, for :func:`kl_terms`.
    """
    if isinstance(weight, float | int) and weight in {0, 1}:
        one = log_a if weight else log_b
        return one, one.exp()
    mixture = weight * log_a.exp() + (1 - weight) * log_b.exp()
    mixture = mixture.clamp_min(torch.finfo(mixture.dtype).tiny)
    return mixture.log(), mixture
