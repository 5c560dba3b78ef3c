"""``kdrun evaluate``: measures of any models on the same rows, and lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdrun.config.sections import RunConfig
from kdrun.data.prepare import read_held_out
from kdrun.data.templates import Rendering
from kdrun.errors import InputError
from kdrun.evaluation.answers import Asked, Question, choose_common_questions
from kdrun.evaluation.judge import judge
from kdrun.evaluation.tasks import TaskChoice, Tasks, TaskScore
from kdrun.evaluation.yardsticks import YARDSTICKS
from kdrun.files import write_json
from kdrun.models.address import is_address
from kdrun.models.attention import check_attention
from kdrun.models.context import context_of
from kdrun.models.pairs import (
    Pair,
    check_context,
    check_head,
    describe_model,
    find_pair,
    load_teacher,
    locate_pair,
)
from kdrun.models.placement import refuse_teacher_device
from kdrun.models.quantize import check_quantization
from kdrun.models.self_teacher import refuse_self
from kdrun.quiet import quiet_libraries
from kdrun.run.environment import versions
from kdrun.run.precision import settle_precision

_MOST_COLUMNS = 4
"""Maximum number of models that are columns of the table."""


@dataclass(frozen=True)
class Found:
    """Results of a model.

    Attributes:
        name: name as the user gave it.
        role: ``teacher`` or ``student``.
        measures: keyed by :data:`kdrun.evaluation.yardsticks.YARDSTICKS`; empty without rows.
        scores: scores of tasks.
    """

    name: str
    role: str
    measures: dict[str, Any] = field(default_factory=dict)
    scores: list[TaskScore] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the entry for the results file."""
        tasks = {"tasks": [asdict(score) for score in self.scores]} if self.scores else {}
        return {"model": self.name, "role": self.role, **self.measures, **tasks}


def evaluate(
    config: RunConfig,
    students: Sequence[str],
    choice: TaskChoice,
    output: Path | None,
    progress: Console,
) -> list[Found]:
    """Evaluate students, and their teacher if one is named, on all rows of ``data.eval``.

    Args:
        config: names the teacher, rows, row length and questions. Without ``data.eval``, only
            tasks are run.
        students: folders of models or of runs, or hub ids.
        choice: lm-eval tasks.
        output: file for the results as JSON.
        progress: called with a line before each stage.

    Returns:
        The measures and scores of each model.

    Raises:
        InputError: a model is missing, its tokenizer differs from the teacher's, no row fits, a
            task is unknown, there is nothing to evaluate, or the output is not writable.
    """
    from kdrun.models.generation import find_model

    if config.data.eval is None and not choice.names:
        raise InputError("nothing to evaluate: pass rows with --data, or tasks with --task")
    if output is not None:
        _check_output(output)
    config = settle_precision(config)
    configs = [
        config.model_copy(
            update={"model": config.model.model_copy(update={"student": str(find_model(student))})}
        )
        for student in students
    ]
    check_attention(config.model)
    check_quantization(config.model, fsdp=False)
    refuse_teacher_device(config.model, "kdrun evaluate")
    refuse_self(config.model.teacher, "kdrun evaluate")
    for one in configs:
        locate_pair(one.model)
    rows, notes = _read(config)
    for note in notes:
        progress.print(note, markup=False)
    with quiet_libraries():
        tasks = Tasks(choice) if choice.names else None
        found = _measure_all(configs, students, rows, tasks, progress)
    Console(highlight=False).print(_table(found))
    if output is not None:
        write_json(output, _report(config, rows, choice, found))
        progress.print(f"written: {output}", markup=False)
    return found


def _check_output(output: Path) -> None:
    """Refuse an unwritable output file before a long evaluation."""
    folder = output.parent
    if not folder.is_dir():
        raise InputError(f"--output {output}: the folder {folder} does not exist; create it")
    if output.exists() and not output.is_file():
        kind = "a folder" if output.is_dir() else "not a regular file"
        raise InputError(f"--output {output}: is {kind}; choose a file for the results")
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"--output {output}: the folder {folder} cannot be written ({error.strerror}); choose "
            "a file elsewhere"
        ) from error


def _read(config: RunConfig) -> tuple[Sequence[Any], list[str]]:
    """Return the rows to evaluate on; none if only tasks are run."""
    if config.data.eval is None:
        return [], []
    return read_held_out(config.data.eval, config.data)


def _report(
    config: RunConfig, rows: Sequence[Any], choice: TaskChoice, found: Sequence[Found]
) -> dict[str, Any]:
    measured = {
        "data": config.data.eval,
        "rows": len(rows),
        "max_length": config.data.max_length,
        "evaluation": config.evaluation.model_dump(),
    }
    return {
        **(measured if rows else {}),
        **({"tasks": choice.as_json()} if choice.names else {}),
        "models": [one.as_json() for one in found],
        "versions": versions(*(["lm_eval"] if choice.names else [])),
    }


def _measure_all(
    configs: Sequence[RunConfig],
    students: Sequence[str],
    rows: Sequence[Any],
    tasks: Tasks | None,
    progress: Console,
) -> list[Found]:
    from kdrun.models.heads import FrozenTeacher, find_split
    from kdrun.models.load import load_model

    pairs = [find_pair(config.model) for config in configs]
    for config, pair in zip(configs, pairs, strict=True):
        if rows:
            check_context(
                pair,
                config.data.max_length,
                config.model.trust_remote_code,
                config.data.teacher_length,
            )

    questions = _choose_questions(configs, pairs, rows, progress)

    def measure(
        name: str,
        role: str,
        model: Any,
        teacher: Any,
        pair: Pair,
        own: RunConfig,
        asked: Sequence[Question],
    ) -> Found:
        check_head(model, pair, name)
        progress.print(f"{role}: {name}, {describe_model(model)}", markup=False)
        settings = (own.data, own.loss, own.evaluation, own.training.batch_size)
        measures = judge(model, teacher, pair, *settings, rows, progress, asked) if rows else {}
        scores: list[TaskScore] = []
        if tasks is not None:
            scores, notes = tasks.run(model, pair.tokenizer, own.training.batch_size)
            for note in notes:
                progress.print(note, markup=False)
        return Found(name, role, measures, scores)

    first = configs[0].model
    found: list[Found] = []

    def say(line: str) -> None:
        progress.print(line, markup=False)

    model = load_teacher(pairs[0], first, say)
    teacher: Any = None
    if is_address(first.teacher) and rows:
        teacher = _served(configs[0], pairs[0], say)
    elif model is not None:
        name, asked = str(first.teacher), questions[-1]
        found.append(measure(name, "teacher", model, None, pairs[0], configs[0], asked))
        teacher = FrozenTeacher(model, find_split(model)) if rows else None
    for name, pair, config, asked in zip(
        students, pairs, configs, questions[: len(pairs)], strict=True
    ):
        trust = config.model.trust_remote_code
        student = load_model(
            pair.student,
            config.model.student_type,
            trust,
            say=say,
            attention=config.model.attention,
        )
        found.append(measure(name, "student", student, teacher, pair, config, asked))
    return found


def _served(config: RunConfig, pair: Pair, say: Callable[[str], None]) -> Any:
    """Open the server of a teacher, which is not measured itself."""
    from kdrun.served.probe import open_served

    longest = config.data.teacher_length
    found = open_served(
        config.model, config.served, pair.tokenizer, pair.vocab_size, [], longest, 1.0, 1, say
    )
    say(f"teacher: {found.asked.model} at {config.model.teacher}, not measured itself")
    return found


def _choose_questions(
    configs: Sequence[RunConfig], pairs: Sequence[Pair], rows: Sequence[Any], progress: Console
) -> Sequence[Sequence[Question]]:
    """Choose the questions for the students, and then for the teacher if there is one."""
    sources = [(pair.tokenizer, pair.student) for pair in pairs]
    if pairs[0].teacher is not None:
        sources.append((pairs[0].tokenizer, pairs[0].teacher))
    if not rows:
        return [()] * len(sources)
    trust = configs[0].model.trust_remote_code
    rendering = Rendering.of(configs[0].data)
    models = [
        Asked(tokenizer, context_of(source, trust), rendering) for tokenizer, source in sources
    ]
    questions, note = choose_common_questions(rows, models, configs[0].evaluation)
    if note is not None:
        progress.print(note, markup=False)
    return questions


def _table(found: Sequence[Found]) -> Table:
    """Build a table with a column per model, or a row per model if there are many."""
    rows, tasks = any(one.measures for one in found), any(one.scores for one in found)
    title = "held-out rows and tasks" if rows and tasks else "tasks" if tasks else "held-out rows"
    models = [f"{one.name} (teacher)" if one.role == "teacher" else one.name for one in found]
    measures: list[tuple[str, list[str], str]] = []
    for yardstick in YARDSTICKS:
        values = [one.measures.get(yardstick.name) for one in found]
        if any(value is not None for value in values):
            cells = ["–" if value is None else f"{value:.4f}" for value in values]
            measures.append((yardstick.title, cells, yardstick.explained))
    for scores in zip(*(one.scores for one in found), strict=True):  # same questions for all
        shown = [score.shown for score in scores]
        measures.append((scores[0].title, shown, scores[0].explained))
    table = Table(title=title, title_justify="left")
    if len(found) > _MOST_COLUMNS:
        table.add_column("model", overflow="fold")
        for name, _, explained in measures:
            table.add_column(escape(f"{name}\n({explained})"), justify="right", overflow="fold")
        for model, *cells in zip(models, *(cells for _, cells, _ in measures), strict=True):
            table.add_row(escape(model), *cells)
        return table
    table.add_column("measure", overflow="fold")
    for model in models:
        table.add_column(escape(model), justify="right", overflow="fold")
    table.add_column("")
    for name, cells, explained in measures:
        table.add_row(name, *cells, explained)
    return table
