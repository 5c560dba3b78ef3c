"""``kdrun compare-losses``: turn its options into trials, a table and a report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.compare.cluster import Cluster, import_ray, run_on_ray
from kdrun.compare.declare import declare, read_declaration, settle_day
from kdrun.compare.display import Display
from kdrun.compare.extra import check_extra
from kdrun.compare.jobs import WORKER, run_jobs
from kdrun.compare.labels import label_arms
from kdrun.compare.ledger import Ledger
from kdrun.compare.outcome import report
from kdrun.compare.plan import (
    DEFAULT_LOSSES,
    Axes,
    Plan,
    default_of,
    find_yardstick,
    methods,
    setting,
    shared_settings,
    trained_on,
)
from kdrun.compare.record import Record, Trial
from kdrun.compare.references import measure_references
from kdrun.compare.run import Caches, Comparison, check_pairs, run_comparison, watch_nothing
from kdrun.compare.teachers import cache_teachers, check_named_cache
from kdrun.compare.trial import quiet_console
from kdrun.config.base import BUILT_IN
from kdrun.config.load import load_config, stated_keys
from kdrun.config.sections import KD_RATIO, ProcedureConfig, RunConfig
from kdrun.data.prepare import read_rows
from kdrun.data.rows import TextRow
from kdrun.errors import InputError, Interrupted, signal_of
from kdrun.models.address import is_address
from kdrun.models.self_teacher import refuse_self
from kdrun.paths import expand_home
from kdrun.procedures.registry import get_procedure
from kdrun.run.features import check_features
from kdrun.run.precision import settle_precision

if TYPE_CHECKING:
    from rich.console import Console

# The default comparison then takes at most a quarter of an hour on two cores.
_BUILT_IN_STEPS = 400
_ANSWERS = 50
_NEVER = 10**9
_LENGTH = {"training.max_steps", "training.num_epochs"}
_CURES = {
    "loss.spec": "use --loss instead",
    "procedure.spec": "use --procedure instead",
    "training.seed": "use --seeds instead",
    "output.dir": "use --output instead",
    "data.part": "remove it",
}
"""Keys that trials vary, which ``--set`` refuses, and what to do instead."""


@dataclass(frozen=True)
class Options:
    """The options of the command line; empty tuples and None for options that were not given.

    Attributes:
        losses: ``--loss``.
        kd_ratios: ``--kd-ratio``.
        lrs: ``--lr``.
        teachers: ``--teacher``.
        students: ``--student``.
        procedures: ``--procedure``; last, because it has a default.
        seeds: ``--seeds``.
        tuning_seeds: ``--tuning-seeds``.
        yardstick: ``--yardstick``.
        difference: ``--difference``.
        config: ``--config``.
        overrides: keys and values of ``--set`` and of flags.
        output: ``--output``.
        keep_students: ``--keep-students``.
        teacher_cache: ``--teacher-cache / --no-teacher-cache``.
        jobs: ``--jobs``.
        cluster: ``--launcher ray`` with its options; None runs the trials on this machine.
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
    teacher_cache: bool
    jobs: int
    cluster: Cluster | None
    dry_run: bool
    procedures: tuple[str, ...] = ()


def comparison_of(options: Options) -> Comparison:
    """Build a comparison from its options; nothing is written.

    Raises:
        InputError: wrong options, unknown losses or missing models.
    """
    given = dict(options.overrides)
    for key, cure in _CURES.items():
        if key in given:
            raise InputError(f"--set {key}: trials of a comparison vary this key; {cure}")
    if "none" in options.teachers:
        raise InputError("--teacher none: a comparison needs a teacher")
    if options.students:
        given.setdefault("model.student", options.students[0])
    if options.teachers:
        given.setdefault("model.teacher", options.teachers[0])
    # The sampling settings are shared by all procedures; the procedure itself is an axis.
    sampled = {key: given.pop(key) for key in list(given) if key.startswith("procedure.")}
    base = load_config(options.config, list(given.items()))
    _check_varied(base, str(options.config))
    stated = stated_keys(options.config)
    procedures = tuple(None if spec == "none" else spec for spec in options.procedures) or (
        base.procedure.spec,
    )
    base = base.model_copy(update={"procedure": _sampling(base, sampled, procedures)})
    if base.model.teacher_cache is not None and not options.teacher_cache:
        raise InputError(
            f"--no-teacher-cache conflicts with model.teacher_cache={base.model.teacher_cache}; "
            "remove one of them"
        )
    if base.model.teacher is None:
        raise InputError("compare-losses needs a --teacher")
    for named in (*options.teachers, base.model.teacher):
        refuse_self(named, "compare-losses")
        if is_address(named):
            raise InputError(
                f"--teacher {named}: a comparison also measures the teacher, whose weights a "
                "server does not give; pass the model, and build its cache from the server with "
                f"'kdrun cache-teacher --teacher {named}' (model.teacher_cache)"
            )
    precision = settle_precision(base).training.precision  # one for all, wherever they run
    # An interrupted trial starts again.
    training: dict[str, Any] = {"save_steps": _NEVER, "precision": precision}
    if base.model.student == BUILT_IN and not _LENGTH & {*given, *stated}:
        training["max_steps"] = _BUILT_IN_STEPS
    check_features(base)
    # A cache given by the user is used unchanged; hidden states of layers come from a live teacher.
    cached = options.teacher_cache and base.model.teacher_cache is None
    cached = cached and base.features.spec is None
    data = base.data
    if options.teacher_cache and "shift_windows" not in data.model_fields_set:
        data = data.model_copy(update={"shift_windows": False})  # as a cache requires
    evaluation = {} if _sets_answers(base) else {"answers": _ANSWERS}
    base = base.model_copy(
        update={
            "data": data,
            "evaluation": base.evaluation.model_copy(update=evaluation),
            "training": base.training.model_copy(update=training),
            "model": base.model.model_copy(update={"init_seed": base.model.init_seed or 0}),
        }
    )
    usual = DEFAULT_LOSSES[:1] if options.procedures or procedures[0] else DEFAULT_LOSSES
    axes = Axes(
        losses=options.losses or ((base.loss.spec,) if "loss.spec" in stated else usual),
        kd_ratios=options.kd_ratios or (base.loss.kd_ratio,),
        lrs=options.lrs or (base.optimizer.lr,),
        teachers=options.teachers or (str(base.model.teacher),),
        students=options.students or (base.model.student,),
        seeds=options.seeds,
        tuning_seeds=options.tuning_seeds,
        procedures=procedures,
        alone=tuple(
            spec for spec in procedures if spec is not None and not get_procedure(spec).on_policy
        ),
    )
    axes.check()
    yardstick = find_yardstick(options.yardstick)
    difference = yardstick.difference if options.difference is None else options.difference
    if not 0 < difference < math.inf:
        raise InputError(f"--difference {difference:g}: must be above 0 and finite")
    shared = setting(shared_settings(base))
    plan = Plan(axes, yardstick, difference, shared, base.data.test is not None)
    return Comparison(plan, base, options.keep_students, cached)


def _check_varied(base: RunConfig, file: str) -> None:
    """Refuse keys that trials vary and that are not the value of an axis.

    Default values are accepted, because the ``config.yaml`` of a run contains them.

    Raises:
        InputError: names the key and the cure.
    """
    for key in ("training.seed", "data.part"):
        section, _, name = key.partition(".")
        value = getattr(getattr(base, section), name)
        if value != default_of(section, name):
            raise InputError(
                f"{file}: {key}={value}: trials of a comparison vary this key; {_CURES[key]}"
            )
    if KD_RATIO in base.loss.schedules:
        raise InputError(
            "loss.schedules: a schedule of kd_ratio would replace the kd_ratio of every arm; use "
            "--kd-ratio instead"
        )


def _sampling(
    base: RunConfig, sampled: Mapping[str, Any], procedures: Sequence[str | None]
) -> ProcedureConfig:
    """Check the sampling settings shared by all procedures; each trial adds its own spec.

    Raises:
        InputError: a wrong value, or settings that no procedure would use.
    """
    overrides = [(key, value) for key, value in sampled.items() if key != "procedure.spec"]
    first = next((spec for spec in procedures if spec is not None), None)
    if first is None:
        load_config(None, overrides)  # refuses each key by name
        return base.procedure
    # Only keys that were given are kept, not the defaults that the first procedure fills in.
    checked = load_config(None, [("procedure.spec", first), *overrides]).procedure
    given = {key.partition(".")[2]: getattr(checked, key.partition(".")[2]) for key, _ in overrides}
    kept = base.procedure.model_dump(exclude_unset=True)
    return ProcedureConfig(**{**kept, **given, "spec": first})


def _check_rows(comparison: Comparison) -> None:
    """Refuse rows on which trials cannot be trained or evaluated.

    Raises:
        InputError: names the file, or what the primary yardstick needs.
    """
    plan, base = comparison.plan, comparison.base
    asks, evaluation = plan.yardstick.asks, base.evaluation
    name = f"--yardstick {plan.yardstick.name}"
    if asks and evaluation.answers == 0:
        raise InputError(f"{name}: scores answers, but evaluation.answers is 0; raise it")
    if plan.yardstick.name == "exact_match" and evaluation.answer_pattern is None:
        raise InputError(
            f"{name}: needs evaluation.answer_pattern to find the final answer, such as "
            "'#### *(.+)'"
        )
    for part in plan.parts:
        rows = read_rows(base.data.model_copy(update={"part": part})).held_out
        if asks and all(isinstance(row, TextRow) for row in rows):
            raise InputError(
                f"{name}: the held-out rows are plain text without prompts; choose another "
                "yardstick, or rows with prompts and answers"
            )


def _sets_answers(base: RunConfig) -> bool:
    """Whether the user set the number of prompts to answer, possibly to 0."""
    return "answers" in base.evaluation.model_fields_set


def compare_losses(options: Options, console: Console) -> None:
    """Run the missing trials of a comparison, and report.

    Raises:
        InputError: wrong input, detected before any trial starts.
        Interrupted: interrupted by Ctrl-C; the running trial is not recorded.
    """
    from kdrun.quiet import quiet_libraries

    check_extra()
    comparison = comparison_of(options)
    if options.cluster is not None:
        import_ray()
    with quiet_libraries():
        check_pairs(comparison)
        _check_rows(comparison)
        check_named_cache(comparison)
        if options.dry_run:
            _show_plan(comparison, [], console)
            return
        ledger = Ledger(_folder_of(options, comparison))
        comparison = settle_day(comparison, ledger)
        try:
            _run(comparison, ledger, options, console)
        except (Interrupted, KeyboardInterrupt) as error:
            raise Interrupted(
                f"interrupted; run the same command with --output {ledger.folder} to run the "
                "missing trials",
                signal_of(error),
            ) from error


def _folder_of(options: Options, comparison: Comparison) -> Path:
    """The folder of a comparison: from the option, from the file, or a new one."""
    given = options.output or comparison.base.output.dir
    return expand_home(given or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-comparison")


def _run(comparison: Comparison, ledger: Ledger, options: Options, console: Console) -> None:
    if os.environ.get(WORKER):  # the parent process has declared the comparison
        caches = _cache_teachers(comparison, ledger, quiet_console())
        run_comparison(comparison, ledger, caches, watch_nothing)
        return
    declare(comparison, ledger)
    _show_declaration(comparison, ledger.folder, console)
    caches = _cache_teachers(comparison, ledger, console)
    measure_references(comparison, ledger, console)
    with Display(console, comparison.plan.yardstick) as display:
        if options.cluster is not None:
            run_on_ray(comparison, ledger, caches, options.cluster, display.update)
        elif options.jobs == 1:
            run_comparison(comparison, ledger, caches, display.update)
        else:
            run_jobs(comparison, ledger, options.jobs, display.update)
    # Read again, since other commands may have extended the plan in the meantime.
    report_again(ledger.folder, console)


def _cache_teachers(comparison: Comparison, ledger: Ledger, console: Console) -> Caches:
    to_run = comparison.plan.open(comparison.plan.own(ledger.records()))
    return cache_teachers(comparison, ledger, to_run, console)


def report_again(folder: Path, console: Console) -> None:
    """Print and write the report of a folder from its records, without running trials.

    Raises:
        InputError: the folder contains no comparison, or a file was edited (the message names it).
    """
    ledger = Ledger.of(folder)
    declared = read_declaration(ledger)
    assert declared is not None
    report(declared.plan, ledger, console)


def _show_declaration(comparison: Comparison, folder: Path, console: Console) -> None:
    plan = comparison.plan
    yardstick, axes = plan.yardstick, plan.axes
    direction = "lower" if yardstick.lower_is_better else "higher"
    console.print(
        f"primary yardstick: {yardstick.title} ({yardstick.unit}, {direction} is better); smallest "
        f"difference of interest: {plan.difference:g}",
        markup=False,
    )
    questions = comparison.base.evaluation
    if questions.answers and comparison.base.data.train != BUILT_IN:
        console.print(
            f"answers: every trial answers up to {questions.answers} held-out prompts "
            f"(evaluation.answers), at most {questions.max_new_tokens} tokens each"
        )
    for spec in trained_on(yardstick, axes):
        console.print(
            f"note: {spec} trains on the primary yardstick itself, which favours it; consider "
            "another --yardstick",
            markup=False,
        )
    if axes.seeds < 2:
        console.print("note: one seed gives no interval and no verdict; use --seeds 2 or more")
    console.print(f"folder: {folder} (the same command resumes the comparison)", markup=False)


def _show_plan(comparison: Comparison, records: Sequence[Record], console: Console) -> None:
    """Print the planned trials and their approximate duration."""
    from rich.markup import escape
    from rich.table import Table

    from kdrun.compare.estimate import trial_seconds

    planned = comparison.plan.planned(records)
    labels = label_arms(trial.arm for trial in planned)
    table = Table(title=f"{len(planned)} trials", title_justify="left")
    for heading in ("arm", "stage", "seeds"):
        table.add_column(heading)
    for arm, stage in dict.fromkeys((trial.arm, trial.stage) for trial in planned):
        seeds = [str(t.seed) for t in planned if (t.arm, t.stage) == (arm, stage)]
        table.add_row(escape(labels[arm]), stage, ", ".join(seeds))
    console.print(table)
    axes = comparison.plan.axes
    total = list(planned)
    if axes.tuned:
        chosen = [method.arms(axes)[0] for method in methods(axes) for _ in range(axes.seeds)]
        console.print(f"and {len(chosen)} final trials of the arms that tuning selects")
        total += [Trial(arm=arm, seed=0) for arm in chosen]
    times = {
        arm: trial_seconds(comparison.base, trial, comparison.cached)
        for arm, trial in {trial.arm: trial for trial in total}.items()
    }
    seconds = [times[trial.arm] for trial in total]
    if None in seconds:
        console.print("time: pass --max-steps for an estimate")
        return
    once = ", plus one pass of each teacher over all rows" if comparison.cached else ""
    procedures = [get_procedure(spec) for spec in axes.procedures if spec is not None]
    if any(procedure.cost(comparison.base).teacher_answers_once for procedure in procedures):
        once += ", plus the teacher's answers to all prompts once"
    console.print(f"time: about {sum(s or 0 for s in seconds) / 60:.0f} min (rough){once}")
