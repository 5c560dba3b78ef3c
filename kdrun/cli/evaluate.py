"""``kdrun evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from kdrun.cli.options import config_options, overrides_of


@click.command("evaluate")
@click.argument("students", nargs=-1, required=True, metavar="STUDENT...")
@click.option(
    "--teacher", metavar="MODEL", help="Also evaluate this teacher, and the distance to it."
)
@click.option("--data", metavar="FILE", help="Rows to evaluate on, or 'builtin'.")
@click.option("--max-length", metavar="L", help="Maximum number of tokens in a row.")
@click.option("--batch-size", metavar="B", help="Rows per batch.")
@click.option("--answers", metavar="N", help="Number of prompts to answer and score.")
@click.option("--max-new-tokens", metavar="N", help="Maximum length of an answer.")
@click.option("--answer-pattern", metavar="REGEX", help="Its first group is the final answer.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="lm-eval task; repeatable.")
@click.option(
    "--task-folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with further task files.",
)
@click.option(
    "--task-data", type=click.Path(path_type=Path), metavar="FILE", help="Data file of such a task."
)
@click.option(
    "--task-limit", type=click.IntRange(1), metavar="N", help="Questions per task; by default all."
)
@config_options("YAML file with the configuration of a run.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File for the results, as JSON.",
)
def evaluate(
    students: tuple[str, ...],
    teacher: str | None,
    data: str | None,
    max_length: str | None,
    batch_size: str | None,
    answers: str | None,
    max_new_tokens: str | None,
    answer_pattern: str | None,
    tasks: tuple[str, ...],
    task_folder: Path | None,
    task_data: Path | None,
    task_limit: int | None,
    config: Path | None,
    settings: tuple[str, ...],
    output: Path | None,
) -> None:
    """Evaluate models on the same rows; STUDENT is a model folder, a run folder or a hub id.

    With --task the models are also evaluated on lm-eval tasks, such as truthfulqa_mc2 or hellaswag.
    """
    for option, value in (
        ("--task-folder", task_folder),
        ("--task-data", task_data),
        ("--task-limit", task_limit),
    ):
        if value is not None and not tasks:
            raise click.UsageError(f"{option} requires --task")
    from kdrun.config.base import BUILT_IN
    from kdrun.config.load import load_config
    from kdrun.evaluation.tasks import TaskChoice
    from kdrun.quiet import make_console
    from kdrun.run.evaluate import evaluate as run

    given = [
        ("model.teacher", teacher),
        ("model.student", students[0]),
        ("loss.kd_ratio", "0" if teacher is None else None),
        ("data.train", data or BUILT_IN),  # a student without training rows is refused
        ("data.eval", data),
        ("data.max_length", max_length),
        ("training.batch_size", batch_size),
        ("evaluation.answers", answers),
        ("evaluation.max_new_tokens", max_new_tokens),
        ("evaluation.answer_pattern", answer_pattern),
    ]
    choice = TaskChoice(tuple(dict.fromkeys(tasks)), task_folder, task_data, task_limit)
    run_config = load_config(config, overrides_of(settings, given))
    run(run_config, students, choice, output, make_console())
