"""``kdrun evaluate``: the measures of any models on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdrun import runs
from kdrun.config import RunConfig
from kdrun.data.prepare import read_held_out
from kdrun.environment import versions
from kdrun.errors import InputError
from kdrun.evaluation.judge import judge
from kdrun.evaluation.yardsticks import YARDSTICKS
from kdrun.pairs import (
    check_context,
    check_head,
    describe_model,
    find_pair,
    load_teacher,
    locate_pair,
)
from kdrun.quiet import quiet_libraries


def evaluate(
    config: RunConfig, students: Sequence[str], output: Path | None, progress: Console
) -> list[dict[str, Any]]:
    """Measure students, and their teacher where one is named, on all rows of ``data.eval``.

    Args:
        config: names the teacher, the rows, their length, and what is asked.
        students: folders of models or of runs, or hub ids.
        output: file for the results as JSON.
        progress: is told what comes next.

    Returns:
        One object for each model: its name, role, and measures by the names of
        :data:`kdrun.evaluation.yardsticks.YARDSTICKS`.

    Raises:
        InputError: a model is not there, has another tokenizer than the teacher, or no row fits.
    """
    from kdrun.generation import find_model

    if output is not None and not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} is not there; create it")
    configs = [
        config.model_copy(
            update={"model": config.model.model_copy(update={"student": str(find_model(student))})}
        )
        for student in students
    ]
    for one in configs:
        locate_pair(one.model)
    rows, notes = read_held_out(str(config.data.eval), config.data)
    for note in notes:
        progress.print(note, markup=False)
    with quiet_libraries():
        found = _measure_all(configs, students, rows, progress)
    if output is not None:
        models = [{"model": name, "role": role, **values} for name, role, values in found]
        runs.write_json(
            output,
            {
                "data": config.data.eval,
                "rows": len(rows),
                "max_length": config.data.max_length,
                "evaluation": config.evaluation.model_dump(),
                "models": models,
                "versions": versions(),
            },
        )
    Console(highlight=False).print(_table(found))
    if output is not None:
        progress.print(f"written: {output}", markup=False)
    return [values for _, _, values in found]


Found = tuple[str, str, dict[str, Any]]


def _measure_all(
    configs: Sequence[RunConfig], students: Sequence[str], rows: Sequence[Any], progress: Console
) -> list[Found]:
    from kdrun.models.heads import FrozenTeacher, find_split
    from kdrun.models.load import load_model

    pairs = [find_pair(config.model) for config in configs]
    for config, pair in zip(configs, pairs, strict=True):
        check_context(config, pair)
    first = configs[0].model
    found: list[Found] = []
    model = load_teacher(pairs[0], first)
    teacher = None
    if model is not None:
        check_head(model, pairs[0], str(pairs[0].teacher))
        progress.print(f"teacher: {first.teacher}, {describe_model(model)}", markup=False)
        measures = judge(model, None, pairs[0], configs[0], rows, progress)
        found.append((str(first.teacher), "teacher", measures))
        teacher = FrozenTeacher(model, find_split(model))
    for name, pair, config in zip(students, pairs, configs, strict=True):
        student = load_model(pair.student, config.model.dtype, config.model.trust_remote_code)
        check_head(student, pair, name)
        progress.print(f"student: {name}, {describe_model(student)}", markup=False)
        measures = judge(student, teacher, pair, config, rows, progress)
        found.append((name, "student", measures))
    return found


def _table(found: Sequence[Found]) -> Table:
    table = Table(title="held-out rows", title_justify="left")
    table.add_column("measure")
    for name, role, _ in found:
        label = f"{name} (teacher)" if role == "teacher" else name
        table.add_column(escape(label), justify="right", overflow="fold")
    table.add_column("")
    for yardstick in YARDSTICKS:
        values = [measures.get(yardstick.name) for _, _, measures in found]
        if any(value is not None for value in values):
            cells = ("–" if value is None else f"{value:.4f}" for value in values)
            table.add_row(yardstick.title, *cells, yardstick.explained)
    return table
