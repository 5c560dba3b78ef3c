"""Training: measures before it, its steps, and interruption on request."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import STOPPING, InputError, Interrupted, TrainingError
from kdrun.evaluation.measures import EVENTS, KEYS
from kdrun.files import write_json
from kdrun.run import folder as runs
from kdrun.served.client import ServerError
from kdrun.training.checkpoint import damage_of, refusing_pickles
from kdrun.training.progress import StopOnRequest

if TYPE_CHECKING:
    from kdrun.run.build import Built
    from kdrun.run.start import Start
    from kdrun.training.trainer import DistillTrainer


def train(built: Built, start: Start) -> dict[str, Any]:
    """Evaluate the student on the held-out rows, then train it or load it from its last step.

    Returns:
        The measures before training.

    Raises:
        TrainingError: training failed.
        Interrupted: it was stopped, after a checkpoint was saved.
    """
    from transformers import TrainerState, set_seed

    trainer = built.trainer
    try:
        before = _measures_before(trainer, start)
    except ServerError as error:
        raise TrainingError(
            f"{error}; no step was done; start again with --resume --output {start.folder}"
        ) from error
    if start.checkpoint is None:
        # Evaluation draws random numbers, and a run that starts over does not evaluate again.
        set_seed(built.config.training.seed)
    if start.trained:  # the run ended between its last checkpoint and its summary
        assert start.checkpoint is not None, "what is trained has a checkpoint"
        with _telling_damage(start.checkpoint):
            trainer.load_weights(start.checkpoint)
            trainer.load_objective(start.checkpoint)
        state = TrainerState.load_from_json(str(start.checkpoint / "trainer_state.json"))
        trainer.state.global_step, trainer.state.log_history = start.first_step, state.log_history
        return before
    try:
        _steps(trainer, start)
    finally:
        built.progress.close()
    return before


def held_out_measures(trainer: DistillTrainer) -> dict[str, Any]:
    """Return means over the supervised tokens of the trainer's held-out rows.

    Those that need a teacher are None without one. An evaluation at the current step, such as the
    one at the end of training, is not repeated.
    """
    return logged_measures(trainer, trainer.state.global_step) or _only_measures(trainer.evaluate())


def logged_measures(trainer: DistillTrainer, step: int) -> dict[str, Any] | None:
    """Return the measures of an evaluation in training; None if there was none at this step."""
    done = (line for line in reversed(trainer.state.log_history) if line.get("step") == step)
    found = next((line for line in done if "eval_ce" in line), None)
    return None if found is None else _only_measures(found)


def _only_measures(found: Mapping[str, Any]) -> dict[str, Any]:
    names = [f"eval_{name}" for name in (*KEYS, EVENTS)]
    return {name: found[name] for name in names if name in found}


def _measures_before(trainer: DistillTrainer, start: Start) -> dict[str, Any]:
    """Return the measures before training; a resumed run keeps those of its first start."""
    path = start.folder / runs.CHECKPOINTS / runs.BEFORE
    if start.resume and path.is_file():
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if trainer.session is not None:
            trainer.session.evaluated(before["eval_ce"])
        return before
    before = held_out_measures(trainer)
    if start.world.is_main:
        path.parent.mkdir(exist_ok=True)
        write_json(path, before)
    return before


def _steps(trainer: DistillTrainer, start: Start) -> None:
    stop = StopOnRequest(trainer)
    trainer.add_callback(stop)

    def request(signum: int, frame: Any) -> None:
        # A second Ctrl-C does not wait for the step to end; schedulers may send theirs twice.
        if signum == signal.SIGINT and stop.signum is not None:
            raise KeyboardInterrupt
        stop.signum = stop.signum or signum

    trainer.stops_evaluating = lambda: stop.signum is not None
    for client in trainer.clients():
        client.stopping = trainer.stops_evaluating
    checkpoint = None if start.checkpoint is None else str(start.checkpoint)
    with (
        _handlers(request),
        _telling_damage(start.checkpoint),
        refusing_pickles(start.checkpoint),
    ):
        lost = _train_until_lost(trainer, checkpoint)
    if lost is not None and not trainer.save_after_failure():
        again = f"start again with --resume --output {start.folder}"
        if stop.signum is not None:
            raise Interrupted(f"interrupted before the first step; {again}", stop.signum)
        raise TrainingError(f"{lost}; no step was done; {again}") from lost
    if stop.signum is not None:
        raise Interrupted(
            f"interrupted and saved at step {trainer.state.global_step}; continue with "
            f"--resume --output {start.folder}",
            stop.signum,
        )
    if lost is not None:
        raise TrainingError(
            f"{lost}; the run was saved at step {trainer.state.global_step}; continue with "
            f"--resume --output {start.folder}"
        ) from lost


def _train_until_lost(trainer: DistillTrainer, checkpoint: str | None) -> ServerError | None:
    """Train to the end, or until a server fails; return the failure."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ServerError as error:
        return error
    return trainer.lost


@contextmanager
def _telling_damage(checkpoint: Path | None) -> Iterator[None]:
    """Turn a failure into one line if the checkpoint was damaged after it had been checked.

    Raises:
        InputError: with the file.
    """
    try:
        yield
    except Exception as error:  # libraries raise whatever their readers raise
        problem = None if checkpoint is None else damage_of(checkpoint)
        if checkpoint is None or problem is None or not checkpoint.is_dir():
            raise
        raise InputError(
            f"--resume: {checkpoint} was damaged while the run was starting: {problem}; resume "
            "again to continue from the checkpoint before it"
        ) from error


@contextmanager
def _handlers(function: Any) -> Iterator[None]:
    """Install a function as handler of the signals that stop a run."""
    previous = {}
    try:
        for signum in STOPPING:
            if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
                previous[signum] = signal.signal(signum, function)
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        for signum, former in previous.items():
            signal.signal(signum, former)
