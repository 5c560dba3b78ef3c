"""A checkpoint: what a run keeps beside the Trainer's own files, and which ones are whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.errors import InputError, TrainingError
from kdrun.files import find_damage, list_files, write_json, write_text

if TYPE_CHECKING:
    from kdlosses import KDObjective
    from kdrun.procedures.session import Session
    from kdrun.training.guard import LossGuard

SHARDS = "shards"
"""In a checkpoint of models that were spread over processes: weights and optimiser in parts."""
COMPLETE = "complete"
"""A file that is written last into a checkpoint, and lists the others with size and SHA-256."""
SCHEDULER = "scheduler.pt"  # as the Trainer calls it
_OBJECTIVE = "objective.json"
_PROCEDURE = "procedure.json"


def save_objective(
    folder: Path, objective: KDObjective, guard: LossGuard, procedure: object
) -> None:
    """Keep schedules, the loss's state, the guard's and the procedure's.

    Args:
        folder: the checkpoint's.
        objective: of the run.
        guard: likewise.
        procedure: what :meth:`Session.state_dict` gives; None without a procedure.
    """
    write_json(folder / _OBJECTIVE, {"objective": objective.state_dict(), "guard": guard.state()})
    if procedure is not None:
        write_text(folder / _PROCEDURE, json.dumps(procedure))


def load_objective(
    folder: Path, objective: KDObjective, guard: LossGuard, session: Session | None
) -> None:
    """Take back what :func:`save_objective` kept.

    Raises:
        TrainingError: it was saved for another loss or procedure.
    """
    saved = json.loads((folder / _OBJECTIVE).read_text(encoding="utf-8"))
    try:
        objective.load_state_dict(saved["objective"])
        guard.restore(saved["guard"])
    except ValueError as error:
        raise TrainingError(f"{folder}: {error}") from error
    path = folder / _PROCEDURE
    if session is None and not path.is_file():
        return
    if session is None or not path.is_file():
        held, wanted = ("without", "has") if session else ("with", "has not")
        raise TrainingError(
            f"{folder}: was saved by a run {held} a procedure, which this one {wanted}; "
            "continue it as it was"
        )
    try:
        session.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
    except TrainingError as error:
        raise TrainingError(f"{folder}: {error}") from error


def mark_complete(folder: Path) -> None:
    """Say that a checkpoint is whole, and what belongs to it; called once all of it is written."""
    (folder / COMPLETE).unlink(missing_ok=True)  # the last step may be saved twice
    write_json(folder / COMPLETE, {"files": list_files(folder)})


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from, and those that it cannot go on from.

    Attributes:
        newest: the newest whole one, or None.
        notes: why later ones are left out, a line each.
    """

    newest: Path | None
    notes: tuple[str, ...]


def find_checkpoint(folder: Path) -> Found:
    """The whole checkpoint with the highest step; every file of it is read once.

    Args:
        folder: of a run's checkpoints.

    Raises:
        InputError: checkpoints were completed, and all of them have been damaged since.
    """
    notes, damaged = [], 0
    for path in reversed(_checkpoints(folder)):
        if not (path / COMPLETE).is_file():
            notes.append(f"{path.name} is incomplete and left out")
            continue
        problem = damage_of(path)
        if problem is None:
            return Found(path, tuple(notes))
        damaged += 1
        notes.append(f"{path.name} is damaged and left out: {problem}")
    if damaged:
        raise InputError(
            f"--resume: {folder}: no checkpoint is whole ({notes[0]}); restore one from a copy, or "
            "begin anew with --overwrite"
        )
    return Found(None, tuple(notes))


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint with the highest step that was completed; its files are not read.

    Args:
        folder: of a run's checkpoints.
    """
    complete = [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]
    return complete[-1] if complete else None


def damage_of(checkpoint: Path) -> str | None:
    """What has become of a checkpoint since it was completed; None where it is whole."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8") or "{}")
    except OSError:
        return f"{COMPLETE} is missing"
    except ValueError:
        listed = {}
    files = listed.get("files", {}) if isinstance(listed, dict) else {}
    if not _is_list_of_files(files):
        return f"{COMPLETE} is not the list of its files"
    return find_damage(checkpoint, files)  # earlier versions listed none


def _is_list_of_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(known, dict) and known.keys() >= {"bytes", "sha256"} for known in files.values()
    )


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def is_last(checkpoint: Path, max_steps: int | None, num_epochs: float) -> bool:
    """Whether a checkpoint is that of the last step, so that nothing is left to train.

    Args:
        checkpoint: its folder.
        max_steps: steps to do, whatever the epochs; None counts epochs.
        num_epochs: epochs to do.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if max_steps is not None:
        return bool(state["global_step"] >= max_steps)
    return bool(state["epoch"] >= num_epochs)


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)
