"""A checkpoint: what a run keeps beside the Trainer's own files, and which ones are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.errors import TrainingError
from kdrun.files import write_json, write_text

if TYPE_CHECKING:
    from kdlosses import KDObjective
    from kdrun.procedures.session import Session
    from kdrun.training.guard import LossGuard

SHARDS = "shards"
"""In a checkpoint of models that were spread over processes: weights and optimiser in parts."""
COMPLETE = "complete"
"""A file that is written last into a checkpoint: without it the checkpoint is not whole."""
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
    """Say that a checkpoint is whole; called once all of it is on the disk."""
    with open(folder / COMPLETE, "w", encoding="utf-8") as marker:
        marker.write("\n")
        marker.flush()
        os.fsync(marker.fileno())


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None.

    Args:
        folder: of a run's checkpoints.
    """
    complete = [path for path in _checkpoints(folder) if (path / COMPLETE).is_file()]
    return complete[-1] if complete else None


def broken_checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints after the newest complete one: a run was cut off in writing them.

    Args:
        folder: of a run's checkpoints.
    """
    names = [path.name for path in _checkpoints(folder)]
    newest = newest_checkpoint(folder)
    return names if newest is None else names[names.index(newest.name) + 1 :]


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
