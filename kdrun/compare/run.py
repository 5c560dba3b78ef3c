"""Run the missing trials of a comparison; an interrupted comparison resumes where it stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Plan, methods
from kdrun.compare.record import Pair, Record, Trial
from kdrun.compare.trial import run_trial, trial_config
from kdrun.config.sections import RunConfig
from kdrun.errors import InputError
from kdrun.losses.build import build_loss, changed_file, check_name, files_of

_WAIT = 2.0


@dataclass(frozen=True)
class Comparison:
    """A declared comparison.

    Attributes:
        plan: the trials.
        base: the configuration shared by all trials.
        keep_students: whether to keep the weights of every trial.
        cached: whether to cache each teacher for all trials, if possible.
    """

    plan: Plan
    base: RunConfig
    keep_students: bool
    cached: bool


Watch = Callable[[Sequence[Trial], Sequence[Record], Trial | None], None]


def watch_nothing(
    planned: Sequence[Trial], records: Sequence[Record], running: Trial | None
) -> None:
    """Show nothing; the parent process shows the progress of its workers."""


Caches = Mapping[Pair, Path]


def run_comparison(
    comparison: Comparison, ledger: Ledger, caches: Caches, watch: Watch
) -> list[Record]:
    """Run all trials without a record.

    Several processes may run on the same folder, because each trial is locked by one process.

    Args:
        comparison: the comparison to run.
        ledger: the ledger with the records.
        caches: teacher caches by pair; a trial without a cache runs its teacher.
        watch: called with the planned trials, the records and the trial that starts.

    Returns:
        The comparison's records.
    """
    while True:
        records = comparison.plan.own(ledger.records())
        watch(comparison.plan.planned(records), records, None)
        open_trials = comparison.plan.open(records)
        if not open_trials:
            return records
        if not any(try_trial(comparison, ledger, caches, trial, watch) for trial in open_trials):
            time.sleep(_WAIT)  # other processes run the remaining trials


def try_trial(
    comparison: Comparison, ledger: Ledger, caches: Caches, trial: Trial, watch: Watch
) -> bool:
    """Run a trial, unless another process holds or has finished it."""
    identity = comparison.plan.identity(trial)
    with ledger.claim(identity) as mine:
        if not mine:
            return False
        records = comparison.plan.own(ledger.records())
        watch(comparison.plan.planned(records), records, trial)
        if trial.arm.loss is not None:
            declared = (ledger.settings() or {}).get("loss_files") or {}
            check_loss_files(declared, files_of(trial.arm.loss), f"--output {ledger.folder}")
        folder = ledger.trial_folder(identity)
        part = comparison.plan.part_of(trial)
        # A cache does not contain text generated in a run.
        cache = None if trial.arm.procedure is not None else caches.get(trial.arm.pair)
        config = trial_config(comparison.base, trial, folder, part, cache)
        ledger.add(run_trial(trial, identity, config, comparison.keep_students))
        return True


def check_loss_files(before: Mapping[str, str], now: Mapping[str, str], place: str) -> None:
    """Refuse a loss whose file was edited, because its trials would be those of another loss.

    Raises:
        InputError: names the file.
    """
    changed = changed_file(before, now)
    if changed is not None:
        raise InputError(
            f"{place}: {changed} was changed after the first trial, so its loss is another one; "
            "restore the file, save the new one under another name and add it with --loss, or "
            "choose another folder"
        )


def check_pairs(comparison: Comparison) -> None:
    """Refuse losses, procedures and pairs that cannot work, before any trial starts.

    Raises:
        InputError: names the loss, the procedure or the model.
    """
    from kdrun.models.attention import check_attention
    from kdrun.models.pairs import check_context, find_pair, locate_pair
    from kdrun.models.placement import refuse_teacher_device
    from kdrun.models.quantize import check_quantization, check_student_quantization
    from kdrun.run.check import procedure_of

    base = comparison.base
    check_attention(base.model)
    check_student_quantization(base.lora, fsdp=False)
    refuse_teacher_device(base.model, "kdrun compare-losses")
    for spec in comparison.plan.axes.losses:
        check_name(spec)
        build_loss(base.loss.model_copy(update={"spec": spec}), vocab_size=None)
    for method in methods(comparison.plan.axes):
        if method.procedure is not None:
            trial = Trial(arm=method.arms(comparison.plan.axes)[0], seed=0)
            procedure_of(trial_config(base, trial, Path("unused"), "all", None))
    for teacher in comparison.plan.axes.teachers:
        for student in comparison.plan.axes.students:
            model = base.model.model_copy(update={"teacher": teacher, "student": student})
            locate_pair(model)
            check_quantization(model, fsdp=False)
            check_context(
                find_pair(model),
                base.data.max_length,
                model.trust_remote_code,
                base.data.teacher_length,
            )
