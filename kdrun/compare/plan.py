"""Turn the axes of a comparison into trials."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from kdrun.compare.record import Arm, Record, Stage, Trial
from kdrun.config.sections import RunConfig
from kdrun.errors import InputError
from kdrun.evaluation.yardsticks import YARDSTICKS, Yardstick

Part = Literal["all", "validation", "test"]

TUNING_FROM = 10**6
"""The first tuning seed, above all final seeds, so that more final seeds do not affect tuning."""
DEFAULT_LOSSES = ("forward_kl_chunked", "reverse_kl_chunked", "generalized_jsd_chunked")
_DEFAULTS = RunConfig().model_dump(mode="json")
# What earlier versions knew: one type for both models, and no mixed precision.
_DEFAULTS["training"]["precision"] = _DEFAULTS["model"]["dtype"] = "float32"
_VARIED = {
    "model": ("teacher", "student"),
    "loss": ("spec", "kd_ratio"),
    "procedure": ("spec",),
    "optimizer": ("lr",),
    "training": ("seed",),
    "data": ("part",),
    "output": ("dir",),
}


@dataclass(frozen=True)
class Axes:
    """The settings that a comparison varies.

    Attributes:
        losses: specs of the losses.
        kd_ratios: weights of the losses, above 0; the baseline has 0.
        lrs: learning rates.
        teachers: folders, hub ids or ``"builtin"``.
        students: initial students, given in the same way.
        seeds: number of final trials per arm.
        tuning_seeds: number of tuning trials per combination of learning rate and ratio.
        procedures: specs of the procedures; None trains on the data.
        alone: procedures that are also used with cross-entropy alone, since they change the data
            rather than the training.
    """

    losses: tuple[str, ...]
    kd_ratios: tuple[float, ...]
    lrs: tuple[float, ...]
    teachers: tuple[str, ...]
    students: tuple[str, ...]
    seeds: int
    tuning_seeds: int
    procedures: tuple[str | None, ...] = (None,)
    alone: tuple[str, ...] = ()

    @property
    def tuned(self) -> bool:
        """Whether a learning rate or a ratio must be selected first."""
        return len(self.lrs) > 1 or len(self.kd_ratios) > 1

    def check(self) -> None:
        """Refuse invalid axes before any trial starts.

        Raises:
            InputError: names the option and the cure.
        """
        for option, values in (
            ("--loss", self.losses),
            ("--kd-ratio", self.kd_ratios),
            ("--lr", self.lrs),
            ("--teacher", self.teachers),
            ("--student", self.students),
            ("--procedure", tuple(spec or "none" for spec in self.procedures)),
        ):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise InputError(f"{option} {twice} is given twice")
        for ratio in self.kd_ratios:
            if not 0 < ratio <= 1:
                raise InputError(
                    f"--kd-ratio {ratio:g}: must be in (0, 1]; the baseline at 0 is always included"
                )
        for lr in self.lrs:
            if not 0 < lr < math.inf:
                raise InputError(f"--lr {lr:g}: must be above 0 and finite")
        if self.seeds < 1:
            raise InputError("--seeds: at least one is needed, and two for a verdict")
        if self.tuned and self.tuning_seeds < 1:
            raise InputError("--tuning-seeds: at least one is needed to select --lr or --kd-ratio")


def merge(before: Axes, now: Axes) -> Axes:
    """The axes of a folder after another command.

    Losses, procedures, models and seeds are merged. Different learning rates, ratios or tuning
    seeds define another comparison, which replaces the first.
    """

    def grid(axes: Axes) -> object:
        tuning = axes.tuning_seeds if axes.tuned else None
        return set(axes.lrs), set(axes.kd_ratios), tuning

    if grid(before) != grid(now):
        return now
    return Axes(
        losses=tuple(dict.fromkeys((*before.losses, *now.losses))),
        kd_ratios=before.kd_ratios,
        lrs=before.lrs,
        teachers=tuple(dict.fromkeys((*before.teachers, *now.teachers))),
        students=tuple(dict.fromkeys((*before.students, *now.students))),
        seeds=max(before.seeds, now.seeds),
        tuning_seeds=now.tuning_seeds,
        procedures=tuple(dict.fromkeys((*before.procedures, *now.procedures))),
        alone=tuple(dict.fromkeys((*before.alone, *now.alone))),
    )


@dataclass(frozen=True)
class Plan:
    """The trials of a comparison, finished or not.

    Attributes:
        axes: the varied settings.
        yardstick: the primary yardstick.
        difference: the smallest difference of interest on it.
        setting: hash of the settings that all trials share.
        test_rows: whether separate test rows are given (``data.test``).
    """

    axes: Axes
    yardstick: Yardstick
    difference: float
    setting: str
    test_rows: bool = False

    @property
    def reported(self) -> Part:
        """The held-out rows for final trials, which are not used for tuning."""
        return "test" if self.axes.tuned or self.test_rows else "all"

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the held-out rows on which trials are evaluated."""
        return ("validation", "test") if self.axes.tuned else (self.reported,)

    def part_of(self, trial: Trial) -> Part:
        """The part of the held-out rows on which a trial is evaluated."""
        return "validation" if trial.stage == "tuning" else self.reported

    def identity(self, trial: Trial) -> str:
        """The name of a trial's record."""
        return trial.identity(f"{self.setting} {self.part_of(trial)}")

    def _names(self, trial: Trial) -> set[str]:
        """The record names that a trial can have in this folder."""
        parts = ("validation",) if trial.stage == "tuning" else ("all", "test")
        return {trial.identity(f"{self.setting} {part}") for part in parts}

    def planned(self, records: Sequence[Record]) -> list[Trial]:
        """All trials known so far; the final trials depend on the tuning."""
        return [
            *tuning_trials(self.axes),
            *final_trials(self.axes, records, self.yardstick),
        ]

    def open(self, records: Sequence[Record]) -> list[Trial]:
        """The trials known so far that have no record."""
        ended = {record.id for record in records}
        return [trial for trial in self.planned(records) if self.identity(trial) not in ended]

    def own(self, records: Sequence[Record]) -> list[Record]:
        """The records of this plan; the folder may contain more.

        Raises:
            InputError: the name of a record does not match its trial.
        """
        strange = [record for record in records if record.id not in self._names(record.trial)]
        if len(strange) > 1 and len(strange) == len(records):
            raise InputError(
                "comparison.yaml: was edited: no record belongs to a trial with its shared "
                "settings; restore it"
            )
        if strange:
            raise InputError(
                f"records/{strange[0].id}.json: was edited: its trial is not the one that "
                "was run; restore it, or delete it to run the trial again"
            )
        known = [record for record in records if self.identity(record.trial) == record.id]
        wanted = {self.identity(trial) for trial in self.planned(known)}
        return [record for record in known if record.id in wanted]


@dataclass(frozen=True)
class Method:
    """One entry of the result: a loss (or none) on a pair, before tuning.

    Attributes:
        loss: spec of the loss; None for cross-entropy alone.
        teacher: the teacher of the pair.
        student: the student of the pair.
        procedure: spec of the procedure; None trains on the data.
    """

    loss: str | None
    teacher: str
    student: str
    procedure: str | None = None

    def arms(self, axes: Axes) -> list[Arm]:
        """The arms of the method, for all ratios and learning rates."""
        ratios = (0.0,) if self.loss is None else axes.kd_ratios
        return [
            Arm(
                loss=self.loss,
                kd_ratio=ratio,
                lr=lr,
                teacher=self.teacher,
                student=self.student,
                procedure=self.procedure,
            )
            for ratio, lr in product(ratios, axes.lrs)
        ]


def methods(axes: Axes) -> list[Method]:
    """All methods: for each pair the baseline, then its losses with each procedure."""
    kinds: list[tuple[str | None, str | None]] = [(None, None)]
    for procedure in axes.procedures:
        kinds += [(None, procedure)] if procedure in axes.alone else []
        kinds += [(loss, procedure) for loss in axes.losses]
    return [
        Method(loss, teacher, student, procedure)
        for teacher, student in product(axes.teachers, axes.students)
        for loss, procedure in kinds
    ]


def tuning_trials(axes: Axes) -> list[Trial]:
    """The tuning trials, with seeds that no final trial uses."""
    if not axes.tuned:
        return []
    seeds = range(TUNING_FROM, TUNING_FROM + axes.tuning_seeds)
    return _seed_by_seed(
        [arm for method in methods(axes) for arm in method.arms(axes)], seeds, "tuning"
    )


def final_trials(axes: Axes, records: Sequence[Record], yardstick: Yardstick) -> list[Trial]:
    """The reported trials: the only arm of each method, or the arm selected by tuning.

    A method whose tuning is unfinished has no final trials yet. If all arms failed, the first one
    is used.
    """
    chosen = []
    for method in methods(axes):
        arms = method.arms(axes)
        if len(arms) == 1:
            chosen.append(arms[0])
        elif (best := choose(arms, axes, records, yardstick)) is not None:
            chosen.append(best)
    return _seed_by_seed(chosen, range(axes.seeds), "final")


def choose(
    arms: Sequence[Arm], axes: Axes, records: Sequence[Record], yardstick: Yardstick
) -> Arm | None:
    """The arm with the best mean yardstick over the tuning seeds; None while trials are missing.

    An arm with a diverged or failed trial is chosen only if every arm has one.
    """
    sign = 1.0 if yardstick.lower_is_better else -1.0
    best: tuple[float, int] | None = None
    for index, arm in enumerate(arms):
        seeds = range(TUNING_FROM, TUNING_FROM + axes.tuning_seeds)
        found = [r for r in records if r.trial.arm == arm and r.trial.seed in seeds]
        if len(found) < axes.tuning_seeds:
            return None
        values = [r.measures.get(yardstick.name) if r.status == "done" else None for r in found]
        known = [value for value in values if value is not None]
        mean = sign * sum(known) / len(known) if len(known) == len(found) else float("inf")
        if best is None or (mean, index) < best:
            best = mean, index
    return None if best is None else arms[best[1]]


def find_yardstick(name: str) -> Yardstick:
    """Find a yardstick by name.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    for yardstick in YARDSTICKS:
        if yardstick.name == name:
            return yardstick
    known = ", ".join(yardstick.name for yardstick in YARDSTICKS)
    raise InputError(f"--yardstick {name}: no such measure; known: {known}")


def trained_on(yardstick: Yardstick, axes: Axes) -> list[str]:
    """The losses of the comparison whose training objective is the yardstick."""
    from kdlosses import parse_spec

    return [
        spec
        for spec in axes.losses
        if any(term.name in yardstick.trained_on_by for term in parse_spec(spec).terms)
    ]


def setting(shared: Mapping[str, Any]) -> str:
    """A hash of the settings from :func:`shared_settings`.

    Keys with default values are omitted, so that new keys in later versions rename no trials.
    """
    changed = {
        section: {key: v for key, v in content.items() if v != default_of(section, key)}
        for section, content in shared.items()
    }
    found = {section: content for section, content in changed.items() if content}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def default_of(section: str, key: str) -> Any:
    """The default value of a key."""
    return _DEFAULTS.get(section, {}).get(key)


def shared_settings(base: RunConfig) -> dict[str, dict[str, Any]]:
    """The configuration without the keys that trials vary."""
    values = base.model_dump(mode="json")
    return {
        section: {key: v for key, v in content.items() if key not in _VARIED.get(section, ())}
        for section, content in values.items()
    }


def _seed_by_seed(arms: Sequence[Arm], seeds: range, stage: Stage) -> list[Trial]:
    """Order trials seed by seed, so that an interrupted comparison has complete seeds."""
    return [Trial(arm=arm, seed=seed, stage=stage) for seed in seeds for arm in arms]
