"""Checkpoints: files that a run adds to the Trainer's own, and which checkpoints are complete."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.errors import InputError, TrainingError
from kdrun.files import find_damage, list_files, write_json, write_text
from kdrun.models.failures import PICKLED
from kdrun.training.best import Best

if TYPE_CHECKING:
    from kdlosses import KDObjective
    from kdrun.config.training_sections import TrainingConfig
    from kdrun.procedures.session import Session
    from kdrun.training.guard import LossGuard

SHARDS = "shards"
"""In a checkpoint of sharded models: shards of weights and optimiser."""
COMPLETE = "complete"
"""The file that is written last, which lists the others with size and SHA-256."""
SCHEDULER = "scheduler.pt"  # the Trainer's name
_OBJECTIVE = "objective.json"
_PROCEDURE = "procedure.json"


def save_objective(
    folder: Path, objective: KDObjective, guard: LossGuard, procedure: object
) -> None:
    """Save schedules and the states of loss, guard and procedure.

    Args:
        folder: folder of the checkpoint.
        objective: objective of the run.
        guard: guard of the run.
        procedure: result of :meth:`Session.state_dict`; None without a procedure.
    """
    write_json(folder / _OBJECTIVE, {"objective": objective.state_dict(), "guard": guard.state()})
    if procedure is not None:
        write_text(folder / _PROCEDURE, json.dumps(procedure))


def load_objective(
    folder: Path, objective: KDObjective, guard: LossGuard, session: Session | None
) -> None:
    """Load what :func:`save_objective` saved.

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
    """Mark a checkpoint as complete and list its files, after all of them are written."""
    (folder / COMPLETE).unlink(missing_ok=True)  # the last step may be saved twice
    write_json(folder / COMPLETE, {"files": list_files(folder)})


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run resumes from, and those that cannot be used.

    Attributes:
        newest: the newest complete one, or None.
        notes: reasons for skipping later ones, one line each.
    """

    newest: Path | None
    notes: tuple[str, ...]


def find_checkpoint(folder: Path) -> Found:
    """Find the complete checkpoint with the highest step; reads each of its files once.

    Args:
        folder: of a run's checkpoints.

    Raises:
        InputError: all completed checkpoints have been damaged since.
    """
    notes, damaged = [], 0
    for path in reversed(_checkpoints(folder)):
        if not (path / COMPLETE).is_file():
            notes.append(f"{path.name} is incomplete and skipped")
            continue
        problem = damage_of(path)
        if problem is None:
            return Found(path, tuple(notes))
        damaged += 1
        notes.append(f"{path.name} is damaged and skipped: {problem}")
    if damaged:
        raise InputError(
            f"--resume: {folder}: no checkpoint is complete ({notes[0]}); restore one from a copy, "
            "or start again with --overwrite"
        )
    return Found(None, tuple(notes))


def newest_complete(folder: Path) -> Path | None:
    """Return the completed checkpoint with the highest step, without reading its files.

    Args:
        folder: of a run's checkpoints.
    """
    complete = [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]
    return complete[-1] if complete else None


def damage_of(checkpoint: Path) -> str | None:
    """Describe the damage to a completed checkpoint; None if it is intact."""
    try:
        listed = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8") or "{}")
    except OSError:
        return f"{COMPLETE} is missing"
    except ValueError:
        listed = {}
    files = listed.get("files", {}) if isinstance(listed, dict) else {}
    if not _is_list_of_files(files):
        return f"{COMPLETE} is not a list of its files"
    return find_damage(checkpoint, files)  # earlier versions listed no files


@contextmanager
def refusing_pickles(checkpoint: Path | None) -> Iterator[None]:
    """Report a checkpoint with files that only running them would read.

    Args:
        checkpoint: the one that is read, if any.

    Raises:
        InputError: names the checkpoint.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"--resume: {checkpoint}: one of its files {PICKLED}; restore it from a copy, or "
            "remove it to continue from the checkpoint before it"
        ) from error


def _is_list_of_files(files: object) -> bool:
    return isinstance(files, dict) and all(
        isinstance(known, dict) and known.keys() >= {"bytes", "sha256"} for known in files.values()
    )


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoint_at(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step, whether or not it exists.

    Args:
        folder: of a run's checkpoints.
        step: an optimiser step.
    """
    return folder / f"checkpoint-{step}"


def is_last(checkpoint: Path, training: TrainingConfig) -> bool:
    """Return whether a checkpoint is from the last step, so that training is complete.

    Args:
        checkpoint: its folder.
        training: the length of training, and what stops it early.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    best = Best.of(training)
    if best is not None and best.stops(state["log_history"]):
        return True
    if training.max_steps is not None:
        return bool(state["global_step"] >= training.max_steps)
    return bool(state["epoch"] >= training.num_epochs)


def _checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints, ordered by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)
