"""Runs what a comparison lacks, trial by trial, and resumes where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Axes, final_trials, setting, tuning_trials
from kdrun.compare.record import Record, Trial
from kdrun.compare.trial import run_trial, trial_config
from kdrun.config import RunConfig
from kdrun.errors import InputError
from kdrun.evaluation.yardsticks import Yardstick

_WAIT = 2.0


@dataclass(frozen=True)
class Comparison:
    """A declared comparison.

    Attributes:
        axes: what is varied.
        base: what all trials share.
        yardstick: the primary one.
        difference: the smallest difference of interest on it.
        keep_students: keep the weights of every trial.
    """

    axes: Axes
    base: RunConfig
    yardstick: Yardstick
    difference: float
    keep_students: bool

    def identity(self, trial: Trial) -> str:
        """The name of a trial's record."""
        return trial.identity(setting(self.base))

    def planned(self, records: Sequence[Record]) -> list[Trial]:
        """All trials that can be named so far; the final ones follow from the tuning."""
        return [
            *tuning_trials(self.axes),
            *final_trials(self.axes, records, self.yardstick),
        ]

    def own(self, records: Sequence[Record]) -> list[Record]:
        """The records of these axes; a folder may hold more."""
        wanted = {self.identity(trial) for trial in self.planned(records)}
        return [record for record in records if record.id in wanted]


Watch = Callable[[Sequence[Trial], Sequence[Record], Trial | None], None]


def run_comparison(comparison: Comparison, ledger: Ledger, watch: Watch) -> list[Record]:
    """Run all trials that have no record.

    Several processes may do this on one folder: each trial is held by one of them.

    Args:
        comparison: what to run.
        ledger: where records are.
        watch: called with the planned trials, the records and the trial that begins.

    Returns:
        The comparison's records.
    """
    while True:
        records = comparison.own(ledger.records())
        planned = comparison.planned(records)
        done = {record.id for record in records}
        open_trials = [trial for trial in planned if comparison.identity(trial) not in done]
        watch(planned, records, None)
        if not open_trials:
            return records
        if not any(_try(comparison, ledger, trial, watch) for trial in open_trials):
            time.sleep(_WAIT)  # other processes hold what is left


def _try(comparison: Comparison, ledger: Ledger, trial: Trial, watch: Watch) -> bool:
    """Run a trial unless another process holds it or has ended it."""
    identity = comparison.identity(trial)
    with ledger.claim(identity) as mine:
        if not mine:
            return False
        records = comparison.own(ledger.records())
        watch(comparison.planned(records), records, trial)
        folder = ledger.trial_folder(identity)
        config = trial_config(comparison.base, trial, folder, comparison.axes.tuned)
        ledger.add(run_trial(trial, identity, config, comparison.keep_students))
        return True


def check_pairs(comparison: Comparison) -> None:
    """Refuse losses and pairs that cannot work, before anything starts.

    Raises:
        InputError: naming the loss or the model.
    """
    from kdrun.distillation import build_loss, check_name
    from kdrun.pairs import find_pair, locate_pair

    base = comparison.base
    for spec in comparison.axes.losses:
        check_name(spec)
        build_loss(base.loss.model_copy(update={"spec": spec}), vocab_size=None)
    for teacher in comparison.axes.teachers:
        for student in comparison.axes.students:
            model = base.model.model_copy(update={"teacher": teacher, "student": student})
            locate_pair(model)
            find_pair(model)


def check_settings(comparison: Comparison, ledger: Ledger, folder: Path) -> None:
    """Refuse a folder that holds a comparison with other shared settings; else declare this one.

    Raises:
        InputError: naming the first setting that differs.
    """
    from kdrun.compare.plan import shared_settings

    shared = shared_settings(comparison.base)
    declared = {
        "yardstick": comparison.yardstick.name,
        "difference": comparison.difference,
    }
    found = ledger.settings()
    if found is None:
        ledger.declare({"shared": shared, **declared})
        return
    for section, values in shared.items():
        for key, value in values.items():
            before = found.get("shared", {}).get(section, {}).get(key)
            if before != value:
                raise InputError(
                    f"--output {folder} holds a comparison with {section}.{key}={before!r}, now "
                    f"{value!r}; name another folder, or set it as it was"
                )
    for key, now in declared.items():
        if found.get(key) != now:
            raise InputError(
                f"--output {folder} was declared with {key} {found.get(key)!r}, now {now!r}: "
                "both are settled before the first trial; name another folder"
            )
