"""The tests of a comparison: paired t tests over seeds, corrected for the number of arms.

The unit of analysis is the seed. All rows of one checkpoint share its weights and give no
information about the next seed, so each trial contributes one number, its mean over rows. An arm is
compared with the baseline on the seeds that both finished, by the differences
``d = arm - baseline``, which share initial student and order of rows. With n seeds, m arms and
level a = 5 %:

- **Difference.** Two-sided paired t test with n - 1 degrees of freedom; p values adjusted by Holm
  (1979) over the m arms. The probability of calling any arm better or worse although it does not
  differ from the baseline is at most a.
- **Equivalence.** Two one-sided t tests (Schuirmann 1987, doi:10.1007/BF01068419) of
  ``|mean| >= delta``, each at a / m (Bonferroni). The probability of calling any arm equivalent
  although it differs by delta or more is at most a.
- **Intervals.** ``mean -+ t(1 - a / 2m) s / sqrt(n)``: all m contain the true differences
  simultaneously with probability 1 - a (Bonferroni, which requires no assumption on the dependence
  between arms that the shared baseline causes). Holm's later steps can find a difference whose
  Bonferroni interval still contains 0; such an interval is cut at 0, so that no interval
  contradicts a verdict. No two-sided intervals of this width match Holm's test exactly
  (Strassburger and Bretz 2008, doi:10.1002/sim.3338): if only some arms differ, the joint coverage
  of intervals and cuts is at least 1 - 2a (simulated, 3 arms: 0.92).
  The two one-sided tests correspond to the shorter interval with t(1 - a / m).

The number of arms m includes every planned arm, even if it diverged or has not run, so that the
level of a verdict does not change as trials finish. The level holds for the planned seeds: adding
seeds until a verdict appears performs more than one test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdrun.compare.extra import compare_extra

with compare_extra():
    from scipy import stats

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEVEL = 0.05
POWER = 0.8
SD_CONFIDENCE = 0.8
"""Confidence of the upper bound of the standard deviation, for the needed seeds."""
MOST_SEEDS = 10_000
"""The largest number of needed seeds that is reported."""


@dataclass(frozen=True)
class Family:
    """Tests of m arms against one baseline; arrays ``[..., m]``.

    Attributes:
        t: mean divided by its standard error.
        p: two-sided p value.
        p_adjusted: p value adjusted by Holm; a difference is found if it is at most :data:`LEVEL`.
        low: lower end of the simultaneous interval.
        high: upper end of the simultaneous interval.
        equivalence_p: the larger of the two one-sided p values, times m.
        equivalence_low: lower end of the interval that lies within -+ delta if equivalent.
        equivalence_high: upper end of that interval.
    """

    t: Floats
    p: Floats
    p_adjusted: Floats
    low: Floats
    high: Floats
    equivalence_p: Floats
    equivalence_low: Floats
    equivalence_high: Floats

    @property
    def differs(self) -> Bools:
        """Whether a difference was found, per arm."""
        return self.p_adjusted <= LEVEL

    @property
    def equivalent(self) -> Bools:
        """Whether a difference of delta or more was ruled out, per arm."""
        return self.equivalence_p <= LEVEL


def holm(p: ArrayLike) -> Floats:
    """Adjusted p values: ``max over j <= i of min(1, (m - j + 1) p_(j))`` of the sorted p.

    Args:
        p: ``[..., m]``.

    Reference: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    values = np.asarray(p, dtype=np.float64)
    order = values.argsort(axis=-1)
    factors = np.arange(values.shape[-1], 0, -1)
    steps = np.take_along_axis(values, order, axis=-1) * factors
    adjusted = np.minimum(np.maximum.accumulate(steps, axis=-1), 1)
    result = np.empty_like(adjusted)
    np.put_along_axis(result, order, adjusted, axis=-1)
    return result


def family_tests(
    mean: ArrayLike, standard_deviation: ArrayLike, seeds: ArrayLike, difference: float, arms: int
) -> Family:
    """Test arms against their baseline.

    Args:
        mean: mean difference of each arm over seeds, ``[..., k]``.
        standard_deviation: standard deviation of the differences, with n - 1; positive.
        seeds: n of each arm, at least 2.
        difference: delta.
        arms: m, at least k; arms that could not be tested count as not rejected.
    """
    center = np.asarray(mean, dtype=np.float64)
    count = np.asarray(seeds)
    freedom = count - 1
    error = np.asarray(standard_deviation) / np.sqrt(count)
    t = center / error
    p = 2 * stats.t.sf(np.abs(t), freedom)
    untested = np.ones((*p.shape[:-1], arms - p.shape[-1]))
    p_adjusted = holm(np.concatenate([p, untested], axis=-1))[..., : p.shape[-1]]
    half = stats.t.isf(LEVEL / arms / 2, freedom) * error
    found = p_adjusted <= LEVEL
    low = np.where(found & (center > 0), np.maximum(center - half, 0), center - half)
    high = np.where(found & (center < 0), np.minimum(center + half, 0), center + half)
    short = stats.t.isf(LEVEL / arms, freedom) * error
    outside = stats.t.sf((difference - np.abs(center)) / error, freedom)
    return Family(
        t=t,
        p=p,
        p_adjusted=p_adjusted,
        low=low,
        high=high,
        equivalence_p=np.minimum(outside * arms, 1),
        equivalence_low=center - short,
        equivalence_high=center + short,
    )


def upper_standard_deviation(standard_deviation: float, seeds: int) -> float:
    """An upper bound with 80 % confidence: ``s sqrt((n - 1) / chi2(0.2; n - 1))``, normal errors.

    A standard deviation over three seeds is below the true value more often than not, so a plan
    based on it is too small (Browne 1995, doi:10.1002/sim.4780141709).
    """
    freedom = seeds - 1
    quantile = float(stats.chi2.ppf(1 - SD_CONFIDENCE, freedom))
    return standard_deviation * float(np.sqrt(freedom / quantile))


def power(seeds: int, standard_deviation: float, difference: float, arms: int) -> float:
    """Probability of finding a true difference among m arms, whatever the other arms are.

    ``P(|T| > t(1 - a / 2m; n - 1))`` where T is noncentral t with n - 1 degrees of freedom and
    noncentrality ``delta sqrt(n) / sigma``: the first and strictest step of Holm.
    """
    freedom = seeds - 1
    critical = stats.t.isf(LEVEL / arms / 2, freedom)
    center = difference * np.sqrt(seeds) / standard_deviation
    # The far tail is negligible for relevant powers, and scipy is unstable there.
    return float(stats.nct.sf(critical, freedom, center))


def needed_seeds(standard_deviation: float, difference: float, arms: int) -> int | None:
    """The fewest seeds that give 80 % power at a true difference, or None for too many.

    Args:
        standard_deviation: standard deviation of the differences, such as its upper bound.
        difference: delta.
        arms: m.
    """

    def enough(seeds: int) -> bool:
        return power(seeds, standard_deviation, difference, arms) >= POWER

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # never enough, assumed enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
