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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdrun.compare.extra import compare_extra
from kdrun.compare.record import Arm, Record, Status
from kdrun.evaluation.yardsticks import Yardstick

with compare_extra():
    from scipy import stats

Verdict = Literal[
    "better", "worse", "equivalent", "identical", "undecided", "diverged", "no verdict"
]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEVEL = 0.05
POWER = 0.8
SD_CONFIDENCE = 0.8
"""Of the upper bound of the standard deviation from which needed seeds are computed."""
MOST_SEEDS = 10_000
"""More needed seeds than this are not counted out."""

_ROUNDING = 1e-12
"""Differences smaller than this share of the measures themselves are rounding."""


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


@dataclass(frozen=True)
class Comparison:
    """The numbers behind a verdict, in the unit of the yardstick; ``d = arm - baseline``.

    Attributes:
        seeds: that arm and baseline have both finished.
        differences: d at each of them.
        mean: of the differences.
        standard_deviation: of the differences, with n - 1.
        t: mean over its standard error.
        p: of the two-sided paired t test, for this arm alone.
        p_adjusted: by Holm over all arms.
        interval: simultaneous over all arms; open where an end is 0.
        equivalence_p: of the two one-sided tests, adjusted by Bonferroni over all arms.
        equivalence_interval: the shorter interval of the two one-sided tests.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    standard_deviation: float
    t: float
    p: float
    p_adjusted: float
    interval: tuple[float, float]
    equivalence_p: float
    equivalence_interval: tuple[float, float]


@dataclass(frozen=True)
class ArmVerdict:
    """What may be said of an arm against the baseline on one yardstick.

    Attributes:
        arm: what is judged.
        baseline: what it is compared with.
        yardstick: what was measured.
        difference: delta, the smallest difference of interest.
        verdict: in one word; ``"better"`` and ``"worse"`` follow the yardstick's direction.
        reason: in one sentence.
        comparison: the numbers; None where no test was possible.
        needed_seeds: where undecided, how many seeds in all give 80 % power at a true difference of
            delta; None for more than :data:`MOST_SEEDS`.
        done: finished trials of the arm.
        diverged: trials of the arm that became NaN or infinite.
        failed: trials of the arm that ended otherwise.
    """

    arm: Arm
    baseline: Arm
    yardstick: Yardstick
    difference: float
    verdict: Verdict
    reason: str
    comparison: Comparison | None = None
    needed_seeds: int | None = None
    done: int = 0
    diverged: int = 0
    failed: int = 0


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


def compare_all(
    records: Sequence[Record],
    baseline_arm: Arm,
    yardstick: Yardstick,
    difference: float,
    arms: Sequence[Arm] = (),
) -> list[ArmVerdict]:
    """Judge every arm against the baseline.

    Only final trials count. Decided before any test is made:

    - An arm of which a trial diverged reads ``"diverged"``, whatever its other seeds say.
    - Where the baseline diverged there is no verdict: its remaining seeds would flatter it.
    - A failed trial is a missing seed; it is counted, and the seed is left out for this arm.
    - Equal measures at every seed read ``"identical"``. Differences that are equal to each other
      but not 0 give no verdict: seeds that change nothing are no replicates, and a standard
      deviation of 0 would make a chance agreement of a coarse measure look certain.
    - A difference that was found but lies within -+ delta reads ``"equivalent"``.

    Args:
        records: of a comparison; of two records of a trial the last counts.
        baseline_arm: what the others are compared with.
        yardstick: what is compared.
        difference: delta, the smallest difference of interest, positive.
        arms: that were planned, of which some may have no record yet.

    Returns:
        A verdict for each arm but the baseline, in the order of ``arms``, then of the records.
    """
    if not difference > 0:
        raise ValueError(f"difference: must be positive, got {difference}")
    final = {
        (record.trial.arm, record.trial.seed): _checked(record, yardstick)
        for record in records
        if record.trial.stage == "final"
    }
    compared = [
        arm for arm in dict.fromkeys([*arms, *(arm for arm, _ in final)]) if arm != baseline_arm
    ]
    pairs = [_Pair.of(final, arm, baseline_arm, yardstick) for arm in compared]
    tested = [pair for pair in pairs if not pair.obstacle and not pair.identical]
    family = (
        family_tests(
            [pair.mean for pair in tested],
            [pair.standard_deviation for pair in tested],
            [len(pair.seeds) for pair in tested],
            difference,
            len(compared),
        )
        if tested
        else None
    )
    verdicts = []
    for pair in pairs:
        common: dict[str, Any] = {
            "arm": pair.arm,
            "baseline": baseline_arm,
            "yardstick": yardstick,
            "difference": difference,
            "done": pair.count("done"),
            "diverged": pair.count("diverged"),
            "failed": pair.count("failed"),
        }
        if family is not None and pair in tested:
            comparison = _numbers(pair, family, tested.index(pair))
            verdicts.append(_judge(comparison, len(compared), common))
        elif pair.obstacle:
            word: Verdict = "diverged" if pair.count("diverged") else "no verdict"
            verdicts.append(ArmVerdict(**common, verdict=word, reason=pair.obstacle))
        else:
            reason = f"the same {yardstick.title} as the baseline at every seed"
            verdicts.append(
                ArmVerdict(
                    **common, verdict="identical", reason=reason, comparison=_no_difference(pair)
                )
            )
    return verdicts


@dataclass(frozen=True)
class _Pair:
    """An arm and the baseline on their common seeds; ``obstacle`` says why no test is possible."""

    arm: Arm
    statuses: tuple[Status, ...]
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    identical: bool
    obstacle: str

    @classmethod
    def of(
        cls, final: dict[tuple[Arm, int], Record], arm: Arm, baseline: Arm, yardstick: Yardstick
    ) -> _Pair:
        own = {seed: record for (owner, seed), record in final.items() if owner == arm}
        others = {seed: record for (owner, seed), record in final.items() if owner == baseline}
        values, base = _values(own, yardstick), _values(others, yardstick)
        seeds = tuple(sorted(values.keys() & base.keys()))
        measured = np.array([(values[seed], base[seed]) for seed in seeds]).reshape(-1, 2)
        differences = measured[:, 0] - measured[:, 1]
        rounding = _ROUNDING * np.abs(measured).max(initial=0)
        constant = bool(len(seeds) and np.ptp(differences) <= rounding)
        identical = constant and bool(np.abs(differences).max() <= rounding)
        return cls(
            arm=arm,
            statuses=tuple(record.status for record in own.values()),
            seeds=seeds,
            differences=tuple(differences.tolist()),
            identical=identical,
            obstacle=_obstacle(own, others, len(seeds), yardstick)
            or ("" if identical or not constant else _CONSTANT),
        )

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def standard_deviation(self) -> float:
        return float(np.std(self.differences, ddof=1))

    def count(self, status: Status) -> int:
        return self.statuses.count(status)


_CONSTANT = (
    "the difference is the same at every seed, so seeds are no replicates here (nothing random in "
    "training, or a measure too coarse)"
)


def _checked(record: Record, yardstick: Yardstick) -> Record:
    """A measure that is not finite is a divergence, whoever wrote the record."""
    value = record.measures.get(yardstick.name)
    if value is None or math.isfinite(value):
        return record
    return record.model_copy(update={"status": "diverged"})


def _values(records: dict[int, Record], yardstick: Yardstick) -> dict[int, float]:
    found = {seed: record.measures.get(yardstick.name) for seed, record in records.items()}
    return {
        seed: value
        for seed, value in found.items()
        if value is not None and records[seed].status == "done"
    }


def _obstacle(
    own: dict[int, Record], others: dict[int, Record], common: int, yardstick: Yardstick
) -> str:
    """Why an arm cannot be tested, or an empty string."""
    diverged = sum(record.status == "diverged" for record in own.values())
    if diverged:
        return f"diverged in {diverged} of {len(own)} seeds"
    lost = sum(record.status == "diverged" for record in others.values())
    if lost:
        return f"the baseline diverged in {lost} of {len(others)} seeds, and the rest flatters it"
    if common >= 2:
        return ""
    for records, name in ((own, "this arm"), (others, "the baseline")):
        done = sum(record.status == "done" for record in records.values())
        failed = sum(record.status == "failed" for record in records.values())
        if done >= 2 and not _values(records, yardstick):
            return f"{yardstick.title} was not measured for {name}"
        if failed and done < 2:
            return f"{failed} of {len(records)} trials of {name} failed"
    have = "one seed" if common else "no seed"
    return f"{have} finished by both this arm and the baseline; an interval needs two"


def _numbers(pair: _Pair, family: Family, place: int) -> Comparison:
    return Comparison(
        seeds=pair.seeds,
        differences=pair.differences,
        mean=pair.mean,
        standard_deviation=pair.standard_deviation,
        t=float(family.t[place]),
        p=float(family.p[place]),
        p_adjusted=float(family.p_adjusted[place]),
        interval=(float(family.low[place]), float(family.high[place])),
        equivalence_p=float(family.equivalence_p[place]),
        equivalence_interval=(
            float(family.equivalence_low[place]),
            float(family.equivalence_high[place]),
        ),
    )


def _no_difference(pair: _Pair) -> Comparison:
    return Comparison(
        seeds=pair.seeds,
        differences=pair.differences,
        mean=0.0,
        standard_deviation=0.0,
        t=0.0,
        p=1.0,
        p_adjusted=1.0,
        interval=(0.0, 0.0),
        equivalence_p=0.0,
        equivalence_interval=(0.0, 0.0),
    )


def _judge(comparison: Comparison, arms: int, common: dict[str, Any]) -> ArmVerdict:
    delta = f"{common['difference']:g}"
    differs = comparison.p_adjusted <= LEVEL
    if comparison.equivalence_p <= LEVEL:
        reason = f"differs from the baseline by less than {delta}"
        if differs:
            reason = f"a difference was found, but it is smaller than {delta}"
        return ArmVerdict(**common, verdict="equivalent", reason=reason, comparison=comparison)
    if differs:
        lower = comparison.mean < 0
        word: Verdict = "better" if lower == common["yardstick"].lower_is_better else "worse"
        reason = f"{'lower' if lower else 'higher'} than the baseline beyond the noise of seeds"
        return ArmVerdict(**common, verdict=word, reason=reason, comparison=comparison)
    seeds = len(comparison.seeds)
    bound = upper_standard_deviation(comparison.standard_deviation, seeds)
    needed = needed_seeds(bound, common["difference"], arms)
    if needed is None:
        advice = f"more than {MOST_SEEDS} seeds would be needed"
    elif needed <= seeds:
        advice = f"{seeds} seeds would show a difference of {delta}: it is likely smaller"
    else:
        advice = f"about {needed} seeds would show a difference of {delta}"
    return ArmVerdict(
        **common,
        verdict="undecided",
        reason=f"neither a difference nor its absence is shown; {advice}",
        comparison=comparison,
        needed_seeds=needed,
    )
