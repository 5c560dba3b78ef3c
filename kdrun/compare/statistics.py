"""What a comparison may claim: paired t tests over seeds, corrected for the number of arms.

The unit is the seed. Rows of one checkpoint share its weights, so however many there are, they say
nothing about the next seed; each trial enters as one number, its mean over rows. An arm is compared
with the baseline on the seeds that both finished, by the differences ``d = arm - baseline``, which
share initial student and order of rows. With n seeds, m arms, level a = 5 %:

- **Difference.** Two-sided paired t test with n - 1 degrees of freedom; p values adjusted by Holm
  (1979) over the m arms. The chance of calling any arm better or worse that does not differ from
  the baseline is at most a.
- **Equivalence.** Two one-sided t tests (Schuirmann 1987, doi:10.1007/BF01068419) of
  ``|mean| >= delta``, each at a / m (Bonferroni). The chance of calling any arm equivalent that
  differs by delta or more is at most a.
- **Intervals.** ``mean -+ t(1 - a / 2m) s / sqrt(n)``: all m at once hold the true differences with
  probability 1 - a (Bonferroni; it needs no assumption on how arms depend on each other, which a
  shared baseline makes them do). Holm's later steps can find a difference whose Bonferroni interval
  still holds 0; such an interval ends at 0, so that no interval contradicts a verdict. No
  two-sided intervals of this width exist that fit Holm's test exactly (Strassburger and Bretz 2008,
  doi:10.1002/sim.3338): where arms with and without a difference are mixed, intervals and cuts
  together hold with at least 1 - 2a (simulated, 3 arms: 0.92).
  The two one-sided tests belong to the shorter interval with t(1 - a / m).

The number of arms m counts every arm that was planned, also those that diverged or wait, so that a
verdict does not change its level as trials come in. It is valid for the seeds that were planned:
who adds seeds until a verdict appears tests more than once.
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
"""Of the upper bound of the standard deviation from which needed seeds are computed."""
MOST_SEEDS = 10_000
"""More needed seeds than this are not counted out."""


@dataclass(frozen=True)
class Family:
    """Tests of m arms against one baseline; arrays ``[..., m]``.

    Attributes:
        t: mean over its standard error.
        p: two-sided.
        p_adjusted: by Holm; a difference was found where at most :data:`LEVEL`.
        low: end of the simultaneous interval.
        high: its other end.
        equivalence_p: the larger of the two one-sided p values, times m.
        equivalence_low: end of the interval that lies within -+ delta where equivalent.
        equivalence_high: its other end.
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
        """Where a difference was found."""
        return self.p_adjusted <= LEVEL

    @property
    def equivalent(self) -> Bools:
        """Where a difference of delta or more was ruled out."""
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
        mean: of the differences of each arm over seeds, ``[..., k]``.
        standard_deviation: of the differences, with n - 1; positive.
        seeds: n of each arm, at least 2.
        difference: delta.
        arms: m, at least k: arms that could not be tested count as not rejected.
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

    A standard deviation over three seeds is below the true one more often than not; plans made
    from it come out too small (Browne 1995, doi:10.1002/sim.4780141709).
    """
    freedom = seeds - 1
    quantile = float(stats.chi2.ppf(1 - SD_CONFIDENCE, freedom))
    return standard_deviation * float(np.sqrt(freedom / quantile))


def power(seeds: int, standard_deviation: float, difference: float, arms: int) -> float:
    """Chance of finding a true difference among m arms, whatever the others are.

    ``P(|T| > t(1 - a / 2m; n - 1))`` where T is noncentral t with n - 1 degrees of freedom and
    noncentrality ``delta sqrt(n) / sigma``: the first step of Holm, the hardest.
    """
    freedom = seeds - 1
    critical = stats.t.isf(LEVEL / arms / 2, freedom)
    center = difference * np.sqrt(seeds) / standard_deviation
    # The far tail adds nothing wherever the power is of interest, and scipy's is unstable there.
    return float(stats.nct.sf(critical, freedom, center))


def needed_seeds(standard_deviation: float, difference: float, arms: int) -> int | None:
    """The fewest seeds that give 80 % power at a true difference, or None for too many.

    Args:
        standard_deviation: of the differences, such as its upper bound.
        difference: delta.
        arms: m.
    """

    def enough(seeds: int) -> bool:
        return power(seeds, standard_deviation, difference, arms) >= POWER

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # never enough, always enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
