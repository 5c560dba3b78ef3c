"""What a report says, before it is laid out: arms with their means, verdicts, what is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kdlosses import LossSpecError, parse_spec
from kdrun.compare.labels import label_arms
from kdrun.compare.record import Arm, Record, Trial
from kdrun.evaluation.yardsticks import YARDSTICKS, Yardstick

if TYPE_CHECKING:
    from kdrun.compare.verdicts import ArmVerdict


@dataclass(frozen=True)
class ReportInput:
    """A comparison, finished or not.

    Attributes:
        title: heading of the page.
        records: of all trials that have ended, tuning included.
        trials: all that are planned, also those that have not run.
        baseline: the arm that the others are compared with.
        yardstick: the primary one, which alone decides.
        difference: the smallest difference of interest, in its unit.
        references: measures, by the names of the yardsticks, of models that no trial trained:
            the untrained student and the teacher.
        notes: sentences to be shown below the verdicts.
    """

    title: str
    records: Sequence[Record]
    trials: Sequence[Trial]
    baseline: Arm
    yardstick: Yardstick
    difference: float
    references: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Spread:
    """A measure over seeds.

    Attributes:
        values: one a seed.
        mean: of them.
        deviation: standard deviation with n - 1; None for one seed.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class ArmSummary:
    """An arm in the tables.

    Attributes:
        arm: what was trained.
        label: what tells it from the others.
        records: its final trials that have ended, by seed.
        planned: how many final trials it should have.
        measures: over its finished trials, by name of the yardstick, where measured.
        speed: supervised tokens a second.
        memory: peak, MiB.
        seconds: of a whole trial.
        generated: tokens that student and teacher wrote in a trial.
        trained_on: the yardsticks that it trains on, with ``"wholly"`` or ``"partly"``.
        verdict: None for the baseline.
    """

    arm: Arm
    label: str
    records: tuple[Record, ...]
    planned: int
    measures: dict[str, Spread]
    speed: Spread | None
    memory: Spread | None
    seconds: Spread | None
    generated: Spread | None
    trained_on: dict[str, str]
    verdict: ArmVerdict | None

    @property
    def done(self) -> int:
        """Finished trials."""
        return sum(record.status == "done" for record in self.records)


@dataclass(frozen=True)
class Summary:
    """All that the pages, tables and figures show.

    Attributes:
        given: what it was made from.
        arms: the baseline first, then in the order of the plan.
        yardsticks: those measured anywhere, the primary one first.
        unwell: trials that diverged or failed.
        missing: planned trials without a record.
        labels: of all arms, those of tuning trials included.
        tuned: label of each arm that was tried in tuning, its primary measure on validation rows,
            and whether it went on to final trials.
    """

    given: ReportInput
    arms: tuple[ArmSummary, ...]
    yardsticks: tuple[Yardstick, ...]
    unwell: tuple[Record, ...]
    missing: tuple[Trial, ...]
    labels: dict[Arm, str]
    tuned: tuple[tuple[str, Spread | None, bool], ...]

    @property
    def with_procedures(self) -> bool:
        """Whether an arm learns from text that is written in the run."""
        return any(arm.arm.procedure is not None for arm in self.arms)

    @property
    def judged(self) -> list[tuple[ArmSummary, ArmVerdict]]:
        """All arms but the baseline."""
        return [(arm, arm.verdict) for arm in self.arms if arm.verdict is not None]


def summarise(given: ReportInput) -> Summary:
    """Bring a comparison into the order of a report."""
    from kdrun.compare.verdicts import compare_all

    # Numbers are shown as finely as the comparison's own difference needs.
    finest = min(given.difference, given.yardstick.difference)
    yardstick = given.yardstick.model_copy(update={"difference": finest})
    given = replace(given, yardstick=yardstick)
    trials = list(dict.fromkeys([*given.trials, *(record.trial for record in given.records)]))
    labels = label_arms(dict.fromkeys([given.baseline, *(trial.arm for trial in trials)]))
    finals = [trial for trial in trials if trial.stage == "final"]
    arms = list(dict.fromkeys([given.baseline, *(trial.arm for trial in finals)]))
    verdicts = {
        verdict.arm: verdict
        for verdict in compare_all(
            given.records, given.baseline, given.yardstick, given.difference, arms
        )
    }
    ended = {record.trial: record for record in given.records}
    measured = {
        name
        for measures in [*(record.measures for record in given.records), *given.references.values()]
        for name, value in measures.items()
        if value is not None
    }
    summaries = []
    for arm in arms:
        own = [trial for trial in finals if trial.arm == arm]
        records = [ended[trial] for trial in own if trial in ended]
        done = [record for record in records if record.status == "done"]
        summaries.append(
            ArmSummary(
                arm=arm,
                label=labels[arm],
                records=tuple(sorted(records, key=lambda record: record.trial.seed)),
                planned=len(own),
                measures={
                    yardstick.name: found
                    for yardstick in YARDSTICKS
                    if (found := _spread(r.measures.get(yardstick.name) for r in done))
                },
                # 0 says that it was not recorded.
                speed=_spread(record.supervised_tokens_per_second or None for record in done),
                memory=_spread(record.peak_memory_mib or None for record in done),
                seconds=_spread(record.seconds or None for record in done),
                generated=_spread(
                    record.generated_tokens if arm.procedure is not None else None
                    for record in done
                ),
                trained_on=_trained_on(arm),
                verdict=verdicts.get(arm),
            )
        )
    primary = given.yardstick
    return Summary(
        given=given,
        arms=tuple(summaries),
        yardsticks=(
            primary,
            *(y for y in YARDSTICKS if y.name in measured and y.name != primary.name),
        ),
        unwell=tuple(record for record in ended.values() if record.status != "done"),
        missing=tuple(trial for trial in trials if trial not in ended),
        labels=labels,
        tuned=tuple(
            (
                labels[arm],
                _spread(
                    record.measures.get(primary.name)
                    for record in given.records
                    if record.trial == Trial(arm=arm, seed=record.trial.seed, stage="tuning")
                ),
                any(trial.arm == arm for trial in finals),
            )
            for arm in dict.fromkeys(trial.arm for trial in trials if trial.stage == "tuning")
        ),
    )


def _trained_on(arm: Arm) -> dict[str, str]:
    """Yardsticks that an arm minimises or maximises itself."""
    try:
        terms = [] if arm.loss is None else [term.name for term in parse_spec(arm.loss).terms]
    except LossSpecError:
        terms = []  # an unknown loss trains on no yardstick that is known
    shares = {term: arm.kd_ratio / len(terms) for term in dict.fromkeys(terms)}
    shares["cross-entropy"] = 1 - arm.kd_ratio
    found = {}
    for yardstick in YARDSTICKS:
        share = max((shares.get(name, 0.0) for name in yardstick.trained_on_by), default=0.0)
        if share > 0:
            found[yardstick.name] = "wholly" if share == 1 else "partly"
    return found


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = tuple(value for value in values if value is not None and math.isfinite(value))
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(known, statistics.fmean(known), deviation)
