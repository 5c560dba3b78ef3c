"""The end of a run: evaluate and save the student, let it answer, and write the summary."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kdrun.errors import without_passwords
from kdrun.evaluation.yardsticks import SHOWN
from kdrun.files import list_files, remove, write_json, write_lines
from kdrun.models.base_print import keep_base_print
from kdrun.models.locate import STUDENT
from kdrun.models.merge import merge_trained
from kdrun.run import folder as runs
from kdrun.run.environment import git_state, versions
from kdrun.run.publish import publish
from kdrun.run.record import Record
from kdrun.run.train import held_out_measures, logged_measures
from kdrun.training.best import Best
from kdrun.training.checkpoint import checkpoint_at, damage_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdrun.config.sections import RunConfig
    from kdrun.run.build import Built
    from kdrun.run.load import Loaded
    from kdrun.run.start import Start
    from kdrun.training.trainer import DistillTrainer


def finish(
    built: Built,
    loaded: Loaded,
    before: Mapping[str, Any],
    changes: Sequence[str],
    began: float,
    start: Start,
) -> dict[str, Any]:
    """Evaluate and save the student, and write ``summary.json``.

    Args:
        built: the trained run.
        loaded: provides the questions for the student.
        before: the measures before training.
        changes: accepted changes of rows or models since the run began.
        began: start of the run, by :func:`time.monotonic`.
        start: provides folder and console.

    Returns:
        The summary.
    """
    trainer = built.trainer
    after, step = held_out_measures(trainer), trainer.state.global_step
    best = Best.of(built.config.training)
    if best is not None:
        after, step = _take_best(trainer, best, after, start)
    student = save_student(trainer, start, built.config, loaded.base)
    if loaded.questions:
        after |= _ask(built, loaded, start)
    written = {} if trainer.session is None else trainer.session.figures()
    summary = {
        "before": dict(before),
        "after": after,
        "steps": trainer.state.global_step,
        **({} if best is None else {"student_step": step}),
        **({"procedure": written} if written else {}),
        **({"accepted_changes": list(changes)} if changes else {}),
        "skipped_steps": trainer.guard.skipped,
        "supervised_tokens_per_second": round(built.rate.rate * trainer.args.world_size, 1),
        **_waited(trainer),
        "training_seconds": round(built.rate.seconds, 2),
        "total_seconds": round(time.monotonic() - began, 2),
        "peak_memory_mib": _peak_memory_mib(),
        "student": student,
        **_loss_files(start),
        "seed": built.config.training.seed,
        "versions": versions(),
        "git": git_state(),
        "command": [without_passwords(word) for word in sys.argv],
    }
    if start.world.is_main:
        write_json(start.folder / runs.SUMMARY, summary)
    _show(built, summary, written, start)
    publish(trainer, start)
    _close_servers(trainer)
    return summary


def _loss_files(start: Start) -> dict[str, dict[str, str]]:
    """Hashes of loss files at the start of the run; the files may have been edited since."""
    record = Record.read(start.folder)
    found = {} if record is None else record.sources.loss_files
    return {"loss_files": found} if found else {}


def _waited(trainer: DistillTrainer) -> dict[str, float]:
    asking = trainer.asking_ahead
    return {} if asking is None else {"seconds_waited_for_teacher": round(asking.teacher.waited, 2)}


def _close_servers(trainer: DistillTrainer) -> None:
    """End requests on their way, and remove weights that were handed over."""
    if trainer.asking_ahead is not None:
        trainer.asking_ahead.teacher.close()
    if trainer.session is not None and trainer.session.hands_over is not None:
        trainer.session.hands_over.close()


def _take_best(
    trainer: DistillTrainer, best: Best, after: dict[str, Any], start: Start
) -> tuple[dict[str, Any], int]:
    """Load the student of the best evaluation, unless it is the last.

    Args:
        trainer: after training.
        best: what counts.
        after: measures of the last step.
        start: provides the folder.

    Returns:
        The measures of the student, and its step.
    """
    last = trainer.state.global_step
    found = best.find(trainer.state.log_history)
    if found is None or found[0] == last:
        start.say(f"the student is that of step {last}, the last, which is the best")
        return after, last
    checkpoint = checkpoint_at(start.folder / runs.CHECKPOINTS, found[0])
    problem = damage_of(checkpoint)
    if problem is not None:
        start.say(
            f"the student is that of step {last}, the last: the best, {checkpoint.name}, cannot be "
            f"used ({problem})"
        )
        return after, last
    trainer.load_weights(checkpoint)
    start.say(
        f"the student is that of step {found[0]} of {last}, the best by {best.measure} "
        f"({found[1]:.4f})"
    )
    return logged_measures(trainer, found[0]) or after, found[0]


def _ask(built: Built, loaded: Loaded, start: Start) -> dict[str, Any]:
    """Write the student's answers and return their mean scores."""
    from kdrun.evaluation.answers import ask, mean_scores
    from kdrun.models.heads import causal_lm

    tokenizer = built.trainer.processing_class
    answers = ask(causal_lm(loaded.student), tokenizer, loaded.questions, built.config.evaluation)
    write_lines(start.folder / runs.ANSWERS, [answer.line() for answer in answers])
    return {f"eval_{name}": value for name, value in mean_scores(answers).items()}


def save_student(
    trainer: DistillTrainer, start: Start, config: RunConfig, base: str | None
) -> dict[str, dict[str, Any]]:
    """Save the student as a Hugging Face folder.

    Args:
        trainer: provides the student.
        start: provides the folder.
        config: its type, and whether adapters are merged into it and also saved next to it.
        base: fingerprint of the base model of its adapters, if any.

    Returns:
        Its files, as :func:`list_files` lists them; none except on the main process.
    """
    import torch

    from kdrun.models.cast import cast_weights
    from kdrun.models.heads import uninstall
    from kdrun.models.shard import gather

    model, tokenizer = trainer.model, trainer.processing_class
    weights = {}
    if trainer.is_distributed_loading_by_transformers:
        weights = {"state_dict": gather(model)}
    if not trainer.args.should_save:
        return {}
    uninstall(model)
    folder = start.folder
    if config.lora.merge:
        _save(model, tokenizer, folder / runs.ADAPTER, base)
        saved = str(folder / runs.ADAPTER)
        model, base = merge_trained(model, config.output.dtype, saved, start.say), None
    else:  # from an earlier merged student
        remove(folder / runs.ADAPTER)
        if config.lora.rank is None and config.output.dtype is not None:
            dtype = getattr(torch, config.output.dtype)
            cast_weights(model, dtype)
            weights = {name: _cast(state, dtype) for name, state in weights.items()}
    return _save(model, tokenizer, folder / STUDENT, base, **weights)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}


def _save(
    model: Any, tokenizer: Any, folder: Path, base: str | None, **weights: Any
) -> dict[str, dict[str, Any]]:
    """Write a model's folder next to the old one, and replace that one once complete.

    Otherwise files of an earlier student, such as an adapter, would be loaded with the new ones.
    """
    from kdrun.models.heads import causal_lm

    partial = folder.with_name(f".{folder.name}.partial")
    remove(partial)
    model.save_pretrained(partial, **weights)
    tokenizer.save_pretrained(partial)
    # For adapters too: a server that merges them reads the end tokens there.
    causal_lm(model).generation_config.save_pretrained(partial)
    keep_base_print(partial, base)
    files = list_files(partial)  # also flushes them
    remove(folder)
    os.replace(partial, folder)
    return files


def _show(
    built: Built, summary: Mapping[str, Any], written: Mapping[str, float], start: Start
) -> None:
    start.console.print(before_after(summary["before"], summary["after"]))
    start.console.print(
        f"{summary['steps']} steps in {built.rate.seconds:.0f} s "
        f"({summary['supervised_tokens_per_second']:.0f} supervised tokens/s), "
        f"{summary['total_seconds']:.0f} s in all, peak memory {summary['peak_memory_mib']} MiB"
    )
    session = built.trainer.session
    if session is not None:
        for line in session.remarks(written):
            start.say(f"procedure {built.config.procedure.spec}: {line}")
    rows: Any = built.trainer.train_dataset
    if passed_over := getattr(rows, "skipped", 0):
        start.say(f"training rows: {passed_over} of the stream could not be used")
    start.say(f"student: {start.folder / STUDENT}")


def _peak_memory_mib() -> int | None:
    """Return the peak memory of this process or its GPU; None if the system does not report it."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return None
    divisor = 2**20 if platform.system() == "Darwin" else 2**10
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / divisor)


def before_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Build a table of the held-out measures before and after training."""
    table = Table(title="held-out rows", title_justify="left")
    for heading in ("measure", "before", "after", ""):
        table.add_column(heading, justify="right" if heading in ("before", "after") else "left")
    for yardstick in SHOWN:
        key = f"eval_{yardstick.name}"
        values = [_figure(measures.get(key)) for measures in (before, after)]
        if key in after:
            table.add_row(yardstick.title, *values, yardstick.explained)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
