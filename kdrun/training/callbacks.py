"""Callbacks for events of training: epochs, steps and evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

if TYPE_CHECKING:
    from kdrun.procedures.session import Session
    from kdrun.training.best import Best

_SETTINGS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


class Stepping(Protocol):
    """Methods that a trainer provides for its steps."""

    train_dataset: Any

    def begin_log(self, step: int) -> None:
        """Start the means of the next log line after a step."""

    def begin_step(self) -> None:
        """Called before the first micro-batch of a step."""

    def end_step(self) -> None:
        """Called when all gradients of a step are available."""

    def advance_objective(self) -> None:
        """Called after the optimiser's step."""

    def move_schedules(self) -> None:
        """Move schedules to the completed share of training."""


class MoveToEpoch(TrainerCallback):
    """Pass the epoch to the training data.

    The loader does so in one process only, and not after resuming within an epoch.
    """

    def __init__(self, trainer: Stepping) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move data that supports epochs; ``state.epoch`` is fractional after resuming."""
        data = self._trainer.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))


class Advance(TrainerCallback):
    """Check the loss before each optimiser step, and advance the objective after it."""

    def __init__(self, trainer: Stepping) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the means of a resumed run's first log line at its first step.

        Schedules continue from the completed share, which is smaller if training was extended.
        """
        self._trainer.begin_log(state.global_step)
        self._trainer.move_schedules()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check before the first micro-batch."""
        self._trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check after the last micro-batch, when all gradients are available."""
        self._trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance after the optimiser's step, before it is logged and saved."""
        self._trainer.advance_objective()


class KeepSettings(TrainerCallback):
    """Restore a model's own settings, which the Trainer changes for training.

    The Trainer disables the key-value cache and copies the tokenizer's special tokens; both would
    be saved with the student and slow down or change generation.

    Args:
        model: a causal language model, before it is passed to the Trainer.
    """

    def __init__(self, model: Any) -> None:
        owners = [model.config, model.config.get_text_config()]
        if model.generation_config is not None:
            owners.append(model.generation_config)
        self._own = [
            (owner, {name: getattr(owner, name) for name in _SETTINGS if hasattr(owner, name)})
            for owner in owners
        ]

    def restore(self) -> None:
        """Restore the settings."""
        for owner, values in self._own:
            for name in _SETTINGS:
                if name in values:
                    setattr(owner, name, values[name])
                elif hasattr(owner, name):
                    delattr(owner, name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the special tokens, which the Trainer has just changed."""
        self.restore()


class TellProcedure(TrainerCallback):
    """Notify a procedure of each evaluation."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any
    ) -> None:
        """Pass on the held-out cross-entropy, which is the same on every process."""
        if state.max_steps == 0 or state.global_step < state.max_steps:  # not after training
            self._session.evaluated(metrics["eval_ce"])


class KeepBest(TrainerCallback):
    """Save after each evaluation that is the best so far, and stop training early.

    The Trainer's own way saves only where steps of evaluations and checkpoints coincide, and its
    early stopping begins to count anew in a resumed run.

    Args:
        best: what counts.
    """

    def __init__(self, best: Best) -> None:
        self._best = best

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the step, so that its checkpoint is saved and kept."""
        found = self._best.find(state.log_history)
        if found is not None and found[0] == state.global_step:
            state.best_global_step, state.best_metric = found
            control.should_save = True
        if self._best.stops(state.log_history):
            control.should_training_stop = control.should_save = True
