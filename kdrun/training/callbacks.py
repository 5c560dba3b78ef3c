"""What the events of a training set off in the trainer itself: epochs, steps, evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

if TYPE_CHECKING:
    from kdrun.procedures.session import Session

_SETTINGS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


class Stepping(Protocol):
    """What a trainer does around its steps."""

    train_dataset: Any

    def begin_log(self, step: int) -> None:
        """Let the means of the next line begin after a step."""

    def begin_step(self) -> None:
        """Before the first micro-batch of a step."""

    def end_step(self) -> None:
        """When all gradients of a step are there."""

    def advance_objective(self) -> None:
        """After the optimiser's step."""

    def move_schedules(self) -> None:
        """Move schedules to the share of the training that is done."""


class MoveToEpoch(TrainerCallback):
    """Tells the training data which epoch it is.

    The loader passes it on in one process only, and not after a resume amid an epoch.
    """

    def __init__(self, trainer: Stepping) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves data that knows epochs; ``state.epoch`` has a fraction after a resume."""
        data = self._trainer.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))


class Advance(TrainerCallback):
    """Looks at the loss before each optimiser step, and moves the objective on after it."""

    def __init__(self, trainer: Stepping) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Means of a resumed run's first line begin with its first step.

        Schedules go on from the share that is done, of a longer training where there is more to do.
        """
        self._trainer.begin_log(state.global_step)
        self._trainer.move_schedules()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch."""
        self._trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last one, when all gradients are there."""
        self._trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimiser's step, before it is logged and saved."""
        self._trainer.advance_objective()


class KeepSettings(TrainerCallback):
    """Gives a model its own settings back, which the Trainer makes those of the training.

    It turns the cache of keys and values off, and takes the tokenizer's special tokens over; both
    would be saved with the student and slow down or change whoever uses it.

    Args:
        model: a causal language model, before the Trainer has it.
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
        """Put them back."""
        for owner, values in self._own:
            for name in _SETTINGS:
                if name in values:
                    setattr(owner, name, values[name])
                elif hasattr(owner, name):
                    delattr(owner, name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer takes the special tokens over just before."""
        self.restore()


class TellProcedure(TrainerCallback):
    """Tells a procedure of each evaluation."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any
    ) -> None:
        """The cross-entropy on held-out rows, which is the same on every process."""
        if state.max_steps == 0 or state.global_step < state.max_steps:  # not after the training
            self._session.evaluated(metrics["eval_ce"])
