"""Runs what a comparison lacks, trial by trial, and resumes where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Plan, part_of
from kdrun.compare.record import Record, Trial
from kdrun.compare.trial import run_trial, trial_config
from kdrun.config import RunConfig

_WAIT = 2.0


@dataclass(frozen=True)
class Comparison:
    """A declared comparison.

    Attributes:
        plan: its trials.
        base: what all of them share.
        keep_students: keep the weights of every trial.
    """

    plan: Plan
    base: RunConfig
    keep_students: bool


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
        records = comparison.plan.own(ledger.records())
        planned = comparison.plan.planned(records)
        done = {record.id for record in records}
        open_trials = [trial for trial in planned if comparison.plan.identity(trial) not in done]
        watch(planned, records, None)
        if not open_trials:
            return records
        if not any(_try(comparison, ledger, trial, watch) for trial in open_trials):
            time.sleep(_WAIT)  # other processes hold what is left


def _try(comparison: Comparison, ledger: Ledger, trial: Trial, watch: Watch) -> bool:
    """Run a trial unless another process holds it or has ended it."""
    identity = comparison.plan.identity(trial)
    with ledger.claim(identity) as mine:
        if not mine:
            return False
        records = comparison.plan.own(ledger.records())
        watch(comparison.plan.planned(records), records, trial)
        folder = ledger.trial_folder(identity)
        part = part_of(trial, comparison.plan.axes.tuned)
        config = trial_config(comparison.base, trial, folder, part)
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
    for spec in comparison.plan.axes.losses:
        check_name(spec)
        build_loss(base.loss.model_copy(update={"spec": spec}), vocab_size=None)
    for teacher in comparison.plan.axes.teachers:
        for student in comparison.plan.axes.students:
            model = base.model.model_copy(update={"teacher": teacher, "student": student})
            locate_pair(model)
            find_pair(model)
