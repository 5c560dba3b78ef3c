"""The verdict for each arm of a comparison, with the numbers that it is based on.

The tests are those of :mod:`kdrun.compare.statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdrun.compare.record import Arm, Record, Status
from kdrun.compare.statistics import (
    LEVEL,
    MOST_SEEDS,
    Family,
    family_tests,
    needed_seeds,
    upper_standard_deviation,
)
from kdrun.evaluation.yardsticks import Yardstick

Verdict = Literal[
    "better", "worse", "equivalent", "identical", "undecided", "diverged", "no verdict"
]
_ROUNDING = 1e-12
"""Differences smaller than this share of the measures are treated as rounding errors."""
_CONSTANT = (
    "the difference is the same at every seed, so seeds are not replicates here (training is not "
    "random, or the measure is too coarse)"
)


@dataclass(frozen=True)
class Comparison:
    """The numbers of a verdict, in the unit of the yardstick; ``d = arm - baseline``.

    Attributes:
        seeds: seeds finished by both arm and baseline.
        differences: d at each seed.
        mean: mean of the differences.
        standard_deviation: standard deviation of the differences, with n - 1.
        t: mean divided by its standard error.
        p: p value of the two-sided paired t test, for this arm alone.
        p_adjusted: p value adjusted by Holm over all arms.
        interval: simultaneous interval over all arms; open if an end is 0.
        equivalence_p: p value of the two one-sided tests, adjusted by Bonferroni over all arms.
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
    """The verdict for an arm compared with the baseline on one yardstick.

    Attributes:
        arm: the arm.
        baseline: the arm that it is compared with.
        yardstick: the measure.
        difference: delta, the smallest difference of interest.
        verdict: the verdict; ``"better"`` and ``"worse"`` follow the yardstick's direction.
        reason: the reason, in one sentence.
        comparison: the numbers; None if no test was possible.
        needed_seeds: if undecided, the total number of seeds that gives 80 % power at a true
            difference of delta; None for more than :data:`MOST_SEEDS`.
        done: number of finished trials of the arm.
        diverged: number of trials that became NaN or infinite.
        failed: number of trials that failed for other reasons.
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


def compare_all(
    records: Sequence[Record],
    baseline_arm: Arm,
    yardstick: Yardstick,
    difference: float,
    arms: Sequence[Arm] = (),
) -> list[ArmVerdict]:
    """Compare every arm with the baseline.

    Only final trials count. The following rules apply:

    - An arm with a diverged trial is ``"diverged"``, regardless of its other seeds.
    - If the baseline diverged, there is no verdict, because its remaining seeds would favour it.
    - A failed trial is a missing seed; it is counted, and the seed is excluded for this arm.
    - Equal measures at every seed are ``"identical"``. Differences that are equal to each other but
      not 0 give no verdict: seeds that change nothing are not replicates, and with a standard
      deviation of 0 a chance agreement of a coarse measure would appear certain.
    - A difference that was found but lies within -+ delta is ``"equivalent"``.

    Args:
        records: records of a comparison; if a trial has two records, the last one counts.
        baseline_arm: the arm that the others are compared with.
        yardstick: the measure to compare.
        difference: delta, the smallest difference of interest, positive.
        arms: planned arms, which may have no records yet.

    Returns:
        A verdict for each arm except the baseline, in the order of ``arms``, then of the records.
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
    """An arm and the baseline on their common seeds; ``obstacle`` is why no test is possible."""

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


def _checked(record: Record, yardstick: Yardstick) -> Record:
    """Treat a measure that is not finite as a divergence."""
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
        return (
            f"the baseline diverged in {lost} of {len(others)} seeds; the remaining seeds favour it"
        )
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
        advice = f"{seeds} seeds would show a difference of {delta}, so it is likely smaller"
    else:
        advice = f"about {needed} seeds would show a difference of {delta}"
    return ArmVerdict(
        **common,
        verdict="undecided",
        reason=f"neither a difference nor equivalence is shown; {advice}",
        comparison=comparison,
        needed_seeds=needed,
    )
