"""What trials are seen against: each teacher and each untrained student, measured once."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import part_of
from kdrun.compare.record import Arm, Trial
from kdrun.compare.run import Comparison
from kdrun.compare.trial import quiet_console, trial_config
from kdrun.errors import InputError
from kdrun.runs import write_json

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.config import RunConfig

FILE = "references.json"
TEACHER, UNTRAINED = "teacher", "untrained student"

References = dict[str, dict[str, float | None]]


class _Entry(BaseModel):
    """What ``references.json`` holds of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    teacher: str
    student: str
    role: Literal["teacher", "untrained student"]
    measures: dict[str, float | None]


_ENTRIES = TypeAdapter(list[_Entry])


def read_references(ledger: Ledger, teacher: str, student: str) -> References:
    """The measures of a pair's teacher and untrained student, as far as they are known.

    Raises:
        InputError: the file was edited into something else.
    """
    found = {
        entry["role"]: entry["measures"]
        for entry in _read(ledger.folder / FILE)
        if (entry["teacher"], entry["student"]) == (teacher, student)
    }
    return {role: found[role] for role in (UNTRAINED, TEACHER) if role in found}


def measure_references(comparison: Comparison, ledger: Ledger, console: Console) -> None:
    """Measure what is not measured yet, on the rows that final trials are measured on.

    Raises:
        InputError: the file was edited into something else.
    """
    path = ledger.folder / FILE
    known = _read(path)
    axes = comparison.plan.axes
    pairs = product(axes.teachers, axes.students)
    open_pairs = [
        (teacher, student)
        for teacher, student in pairs
        if not any((e["teacher"], e["student"]) == (teacher, student) for e in known)
    ]
    for teacher, student in open_pairs:
        console.print(f"measuring {teacher} and the untrained {student}", markup=False)
        arm = Arm(loss=None, kd_ratio=0.0, lr=1.0, teacher=teacher, student=student)
        trial = Trial(arm=arm, seed=0)
        part = part_of(trial, axes.tuned)
        config = trial_config(comparison.base, trial, ledger.folder, part, cache=None)
        for role, measures in _measure_pair(config).items():
            known.append(
                {"teacher": teacher, "student": student, "role": role, "measures": measures}
            )
        write_json(path, known)


def _measure_pair(config: RunConfig) -> References:
    from kdrun.data.prepare import read_rows
    from kdrun.evaluation.judge import judge
    from kdrun.models.heads import FrozenTeacher, find_split
    from kdrun.pairs import find_pair, load_student, load_teacher

    pair = find_pair(config.model)
    rows = read_rows(config.data).held_out
    model = load_teacher(pair, config.model)
    assert model is not None, "a comparison has a teacher"
    quiet = quiet_console()
    teacher_measures = judge(model, None, pair, config, rows, quiet)
    teacher = FrozenTeacher(model, find_split(model))
    student = load_student(pair, config.model, config.training.seed)
    return {
        UNTRAINED: judge(student, teacher, pair, config, rows, quiet),
        TEACHER: teacher_measures,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        entries = _ENTRIES.validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: not the file that was written; delete it to have it measured again"
        ) from error
    return [entry.model_dump() for entry in entries]
