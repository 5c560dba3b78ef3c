"""``kdrun compare-losses``: from its options to trials, table and report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.compare.display import Display, arm_name
from kdrun.compare.jobs import WORKER, run_jobs
from kdrun.compare.ledger import Ledger
from kdrun.compare.outcome import report
from kdrun.compare.plan import DEFAULT_LOSSES, Axes, find_yardstick, trained_on
from kdrun.compare.record import Record, Trial
from kdrun.compare.references import measure_references
from kdrun.compare.run import Comparison, check_pairs, check_settings, run_comparison
from kdrun.config import BUILT_IN, RunConfig, load_config
from kdrun.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

# Short enough that the default comparison ends in a quarter of an hour on two cores.
_BUILT_IN_STEPS = 400
_ANSWERS = 50
_NEVER = 10**9


@dataclass(frozen=True)
class Options:
    """What the command line gives; empty tuples and None where nothing was given.

    Attributes:
        losses: ``--loss``.
        kd_ratios: ``--kd-ratio``.
        lrs: ``--lr``.
        teachers: ``--teacher``.
        students: ``--student``.
        seeds: ``--seeds``.
        tuning_seeds: ``--tuning-seeds``.
        yardstick: ``--yardstick``.
        difference: ``--difference``.
        config: ``--config``.
        overrides: keys and values of ``--set`` and of flags.
        output: ``--output``.
        keep_students: ``--keep-students``.
        jobs: ``--jobs``.
        dry_run: ``--dry-run``.
    """

    losses: tuple[str, ...]
    kd_ratios: tuple[float, ...]
    lrs: tuple[float, ...]
    teachers: tuple[str, ...]
    students: tuple[str, ...]
    seeds: int
    tuning_seeds: int
    yardstick: str
    difference: float | None
    config: Path | None
    overrides: tuple[tuple[str, Any], ...]
    output: str | None
    keep_students: bool
    jobs: int
    dry_run: bool


def declare(options: Options) -> Comparison:
    """What is to be compared; nothing is written.

    Raises:
        InputError: wrong options, unknown losses, models that are not there.
    """
    given = dict(options.overrides)
    if options.students:
        given.setdefault("model.student", options.students[0])
    if options.teachers:
        given.setdefault("model.teacher", options.teachers[0])
    base = load_config(options.config, list(given.items()))
    if base.model.teacher is None:
        raise InputError("compare-losses needs a --teacher: there is nothing to distil without one")
    training: dict[str, Any] = {"save_steps": _NEVER}  # a trial that is cut off runs again
    if base.model.student == BUILT_IN and "training.max_steps" not in given:
        training["max_steps"] = _BUILT_IN_STEPS
    evaluation = {} if _sets_answers(base) else {"answers": _ANSWERS}
    base = base.model_copy(
        update={
            "evaluation": base.evaluation.model_copy(update=evaluation),
            "training": base.training.model_copy(update=training),
            "model": base.model.model_copy(update={"init_seed": base.model.init_seed or 0}),
        }
    )
    axes = Axes(
        losses=options.losses or DEFAULT_LOSSES,
        kd_ratios=options.kd_ratios or (base.loss.kd_ratio,),
        lrs=options.lrs or (base.optimizer.lr,),
        teachers=options.teachers or (str(base.model.teacher),),
        students=options.students or (base.model.student,),
        seeds=options.seeds,
        tuning_seeds=options.tuning_seeds,
    )
    axes.check()
    yardstick = find_yardstick(options.yardstick)
    difference = yardstick.difference if options.difference is None else options.difference
    if not difference > 0:
        raise InputError(f"--difference {difference:g}: must be above 0")
    return Comparison(axes, base, yardstick, difference, options.keep_students)


def _sets_answers(base: RunConfig) -> bool:
    """Whether the user said how many prompts are answered, 0 included."""
    return "answers" in base.evaluation.model_fields_set


def compare_losses(options: Options, console: Console) -> None:
    """Run what the comparison lacks, and report.

    Raises:
        InputError: wrong input, before anything starts.
    """
    from kdrun.quiet import quiet_libraries

    comparison = declare(options)
    with quiet_libraries():
        check_pairs(comparison)
        if options.dry_run:
            _show_plan(comparison, [], console)
            return
        folder = Path(options.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-comparison")
        ledger = Ledger(folder)
        check_settings(comparison, ledger, folder)
        if os.environ.get(WORKER):
            run_comparison(comparison, ledger, _nothing)
            return
        _show_declaration(comparison, folder, console)
        measure_references(comparison, ledger, console)
        with Display(console, comparison.yardstick) as display:
            if options.jobs == 1:
                records = run_comparison(comparison, ledger, display.update)
            else:
                records = run_jobs(comparison, ledger, options.jobs, display.update)
        report(comparison, records, ledger, console)


def _nothing(planned: Sequence[Trial], records: Sequence[Record], running: Trial | None) -> None:
    """A worker shows nothing: its parent does."""


def _show_declaration(comparison: Comparison, folder: Path, console: Console) -> None:
    yardstick, axes = comparison.yardstick, comparison.axes
    direction = "lower" if yardstick.lower_is_better else "higher"
    console.print(
        f"primary yardstick: {yardstick.title} ({yardstick.unit}, {direction} is better); smallest "
        f"difference of interest: {comparison.difference:g}",
        markup=False,
    )
    questions = comparison.base.evaluation
    if questions.answers and comparison.base.data.train != BUILT_IN:
        console.print(
            f"answers: of every trial to at most {questions.answers} held-out prompts "
            f"(evaluation.answers), {questions.max_new_tokens} tokens each"
        )
    for spec in trained_on(yardstick, axes):
        console.print(
            f"note: {spec} trains on the primary yardstick itself, which favours it; consider "
            "another --yardstick",
            markup=False,
        )
    if axes.seeds < 2:
        console.print("note: one seed allows no interval and no verdict; use --seeds 2 or more")
    console.print(f"folder: {folder} (the same command resumes there)", markup=False)


def _show_plan(comparison: Comparison, records: Sequence[Record], console: Console) -> None:
    """The trials, and about how long they take."""
    from rich.markup import escape
    from rich.table import Table

    from kdrun.compare.estimate import trial_seconds

    planned = comparison.planned(records)
    arms = [trial.arm for trial in planned]
    table = Table(title=f"{len(planned)} trials", title_justify="left")
    for heading in ("arm", "stage", "seeds"):
        table.add_column(heading)
    for arm, stage in dict.fromkeys((trial.arm, trial.stage) for trial in planned):
        seeds = [str(t.seed) for t in planned if (t.arm, t.stage) == (arm, stage)]
        table.add_row(escape(arm_name(arm, arms)), stage, ", ".join(seeds))
    console.print(table)
    axes = comparison.axes
    total = list(planned)
    if axes.tuned:
        count = axes.seeds * len(axes.teachers) * len(axes.students) * (1 + len(axes.losses))
        console.print(f"and {count} final trials of the arms that tuning chooses")
        total += planned[:1] * count
    times = {}
    for trial in total:
        key = (trial.arm.kd_ratio > 0, trial.arm.teacher, trial.arm.student)
        if key not in times:
            times[key] = trial_seconds(comparison.base, trial)
    seconds = [
        times[trial.arm.kd_ratio > 0, trial.arm.teacher, trial.arm.student] for trial in total
    ]
    if None in seconds:
        console.print("time: give --max-steps for an estimate")
    else:
        console.print(f"time: about {sum(s or 0 for s in seconds) / 60:.0f} min (rough)")
