"""Reference measures of each teacher and each untrained student, evaluated once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Part
from kdrun.compare.record import Arm, Pair, Trial
from kdrun.compare.run import Comparison
from kdrun.compare.trial import quiet_console, trial_config
from kdrun.errors import InputError
from kdrun.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.config.sections import RunConfig

FILE = "references.json"
TEACHER, UNTRAINED = "teacher", "untrained student"

References = dict[str, dict[str, float | None]]


class _Entry(BaseModel):
    """An entry of ``references.json``: one model on one part of the held-out rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: str
    student: str
    part: Part = "all"
    role: Literal["teacher", "untrained student"]
    measures: dict[str, float | None]


_ENTRIES = TypeAdapter(list[_Entry])


def read_references(ledger: Ledger, pair: Pair, part: Part) -> References:
    """Read the known measures of a pair's teacher and untrained student.

    Args:
        ledger: ledger of the comparison.
        pair: teacher and student.
        part: the part of the held-out rows.

    Raises:
        InputError: the file was edited and is not valid.
    """
    found = {
        entry["role"]: entry["measures"]
        for entry in _read(ledger.folder / FILE)
        if _key(entry) == (*pair, part)
    }
    return {role: found[role] for role in (UNTRAINED, TEACHER) if role in found}


def measure_references(comparison: Comparison, ledger: Ledger, console: Console) -> None:
    """Evaluate the models without measures, on the rows used for final trials.

    Raises:
        InputError: the file was edited and is not valid.
    """
    path = ledger.folder / FILE
    known = _read(path)
    axes, part = comparison.plan.axes, comparison.plan.reported
    measured = {_key(entry) for entry in known}
    pairs = product(axes.teachers, axes.students)
    open_pairs = [pair for pair in pairs if (*pair, part) not in measured]
    for teacher, student in open_pairs:
        console.print(f"evaluating {teacher} and the untrained {student}", markup=False)
        arm = Arm(loss=None, kd_ratio=0.0, lr=1.0, teacher=teacher, student=student)
        trial = Trial(arm=arm, seed=0)
        config = trial_config(comparison.base, trial, ledger.folder, part, cache=None)
        for role, measures in _measure_pair(config).items():
            of = {"teacher": teacher, "student": student, "part": part, "role": role}
            known.append({**of, "measures": measures})
        write_json(path, known)


def _measure_pair(config: RunConfig) -> References:
    from kdrun.data.prepare import read_rows
    from kdrun.evaluation.judge import judge
    from kdrun.models.heads import FrozenTeacher, find_split
    from kdrun.models.pairs import find_pair, load_student, load_teacher
    from kdrun.run.precision import settle_precision

    config = settle_precision(config)
    pair = find_pair(config.model)
    rows = read_rows(config.data).held_out
    model = load_teacher(pair, config.model)
    assert model is not None, "a comparison has a teacher"
    quiet = quiet_console()
    asked = (config.data, config.loss, config.evaluation, config.training.batch_size)
    teacher_measures = judge(model, None, pair, *asked, rows, quiet)
    teacher = FrozenTeacher(model, find_split(model))
    student = load_student(pair, config.model, config.training.seed)
    return {
        UNTRAINED: judge(student, teacher, pair, *asked, rows, quiet),
        TEACHER: teacher_measures,
    }


def _key(entry: dict[str, Any]) -> tuple[str, str, Part]:
    return entry["teacher"], entry["student"], entry["part"]


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        entries = _ENTRIES.validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: was edited or damaged; delete it to evaluate the models again"
        ) from error
    return [entry.model_dump() for entry in entries]
