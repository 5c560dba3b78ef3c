"""The end of a run: evaluate and save the student, let it answer, and write the summary."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kdrun.evaluation.yardsticks import YARDSTICKS
from kdrun.files import list_files, write_json, write_lines
from kdrun.models.base_print import keep_base_print
from kdrun.models.locate import STUDENT
from kdrun.models.merge import merge_trained
from kdrun.run import folder as runs
from kdrun.run.environment import git_state, versions
from kdrun.run.train import held_out_measures

if TYPE_CHECKING:
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
    after = held_out_measures(trainer)
    student = save_student(trainer, start, built.config.lora.merge, loaded.base)
    if loaded.questions:
        after |= _ask(built, loaded, start)
    written = {} if trainer.session is None else trainer.session.figures()
    summary = {
        "before": dict(before),
        "after": after,
        "steps": trainer.state.global_step,
        **({"procedure": written} if written else {}),
        **({"accepted_changes": list(changes)} if changes else {}),
        "skipped_steps": trainer.guard.skipped,
        "supervised_tokens_per_second": round(built.rate.rate * trainer.args.world_size, 1),
        "training_seconds": round(built.rate.seconds, 2),
        "total_seconds": round(time.monotonic() - began, 2),
        "peak_memory_mib": _peak_memory_mib(),
        "student": student,
        "seed": built.config.training.seed,
        "versions": versions(),
        "git": git_state(),
        "command": sys.argv,
    }
    if start.world.is_main:
        write_json(start.folder / runs.SUMMARY, summary)
    _show(built, summary, written, start)
    return summary


def _ask(built: Built, loaded: Loaded, start: Start) -> dict[str, Any]:
    """Write the student's answers and return their mean scores."""
    from kdrun.evaluation.answers import ask, mean_scores
    from kdrun.models.heads import causal_lm

    tokenizer = built.trainer.processing_class
    answers = ask(causal_lm(loaded.student), tokenizer, loaded.questions, built.config.evaluation)
    write_lines(start.folder / runs.ANSWERS, [answer.line() for answer in answers])
    return {f"eval_{name}": value for name, value in mean_scores(answers).items()}


def save_student(
    trainer: DistillTrainer, start: Start, merge: bool, base: str | None
) -> dict[str, dict[str, Any]]:
    """Save the student as a Hugging Face folder.

    Args:
        trainer: provides the student.
        start: provides the folder.
        merge: merge the adapters into it, and also save them next to it.
        base: fingerprint of the base model of its adapters, if any.

    Returns:
        Its files, as :func:`list_files` lists them; none except on the main process.
    """
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
    if merge:
        _save(model, tokenizer, folder / runs.ADAPTER, base)
        model, base = merge_trained(model, str(folder / runs.ADAPTER), start.say), None
    else:  # from an earlier merged student
        shutil.rmtree(folder / runs.ADAPTER, ignore_errors=True)
    return _save(model, tokenizer, folder / STUDENT, base, **weights)


def _save(
    model: Any, tokenizer: Any, folder: Path, base: str | None, **weights: Any
) -> dict[str, dict[str, Any]]:
    """Write a model's folder next to the old one, and replace that one once complete.

    Otherwise files of an earlier student, such as an adapter, would be loaded with the new ones.
    """
    from kdrun.models.heads import causal_lm

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, **weights)
    tokenizer.save_pretrained(partial)
    # For adapters too: a server that merges them reads the end tokens there.
    causal_lm(model).generation_config.save_pretrained(partial)
    keep_base_print(partial, base)
    files = list_files(partial)  # also flushes them
    shutil.rmtree(folder, ignore_errors=True)
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
    for yardstick in YARDSTICKS:
        key = f"eval_{yardstick.name}"
        values = [_figure(measures.get(key)) for measures in (before, after)]
        if key in after:
            table.add_row(yardstick.title, *values, yardstick.explained)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
