"""Overridden methods of the Trainer, and why each cannot be a callback.

The Trainer has no public hook at these places; its other behaviour is unchanged.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from kdlosses import KDObjective
from kdrun.errors import InputError
from kdrun.models.heads import Teacher, causal_lm
from kdrun.models.mean_teacher import MeanAdapters, MeanTeacher, save_mean
from kdrun.models.shard import gather_trained, load_shards, save_shards
from kdrun.procedures.session import Session
from kdrun.served.client import Client, ServerError
from kdrun.training.checkpoint import (
    COMPLETE,
    SCHEDULER,
    SHARDS,
    checkpoint_at,
    load_objective,
    mark_complete,
    refusing_pickles,
    save_objective,
)
from kdrun.training.features import HiddenTerm
from kdrun.training.guard import LossGuard
from kdrun.training.served import RandomStates


class EvaluationStopped(Exception):  # noqa: N818 - not an error: a signal requested it
    """An evaluation during training was interrupted because the run was asked to stop."""


class SavingTrainer(Trainer):
    """A Trainer whose checkpoints include the objective, are marked complete, and may be sharded.

    Attributes:
        objective: objective of training.
        guard: checks losses and gradients.
        session: session of the procedure, or None.
        features: the term on hidden states, or None.
        teacher: the teacher for training; the mean of the student's weights is part of checkpoints.
        lost: the failure of a server that ended an evaluation.
    """

    objective: KDObjective
    guard: LossGuard
    session: Session | None
    features: HiddenTerm | None = None
    teacher: Teacher | None
    lost: ServerError | None = None
    _after_step: RandomStates | None = None

    def clients(self) -> list[Client]:
        """Return what asks servers, for which a step may fail at its start."""
        return []

    def save_after_failure(self) -> bool:
        """Save the last completed step of a run whose next one could not begin.

        Returns:
            Whether there is a checkpoint of it.
        """
        step = self.state.global_step
        if step == 0:
            return False
        if (checkpoint_at(Path(self.args.output_dir), step) / COMPLETE).is_file():
            return True
        if self._after_step is None:
            return False
        self._after_step.restore()
        self._save_checkpoint(self.model_wrapped, trial=None)
        return True

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Keep the random states after a step, which the next one may have changed at its start."""
        super()._maybe_log_save_evaluate(*args, **options)
        if self.clients():
            self._after_step = RandomStates.now()

    def load_objective(self, checkpoint: str | Path) -> None:
        """Load schedules and the states of loss and procedure from a checkpoint.

        Raises:
            TrainingError: it was saved for another loss or procedure.
        """
        load_objective(Path(checkpoint), self.objective, self.guard, self.session)
        if isinstance(self.teacher, MeanTeacher | MeanAdapters):
            self.teacher.load(Path(checkpoint))

    def load_weights(self, checkpoint: str | Path) -> None:
        """Load only the student's weights from a checkpoint.

        Raises:
            InputError: their shapes differ from the student's, or they are not only weights.
        """
        with refusing_pickles(Path(checkpoint)):
            self._load_from_checkpoint(str(checkpoint))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Add the projectors of hidden states, which are not part of the student."""
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made and self.features is not None:
            self.features.join(optimizer, self.args.weight_decay)
        return optimizer

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Average the projectors' gradients before a scale of fp16 is removed from them."""
        loss: Tensor = super().training_step(*args, **options)
        if self.features is not None and self.accelerator.sync_gradients:
            self.features.average(self.accelerator)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Record the norm: no event lies between clipping, which computes it, and the optimiser."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.features is not None and self.features.projectors:
            own = self.features.clip(self.args.max_grad_norm)
            if self.accelerator.scaler is None:
                self.guard.note_gradient(own)
        # An fp16 scaler skips such a step itself, and lowers its scale for the next.
        if self.accelerator.scaler is None:
            self.guard.note_gradient(float(norm))
        return norm

    def _evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Save and stop if a signal or a server ends an evaluation; the caller saves after it."""
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **options)
        except (EvaluationStopped, ServerError) as error:
            self.lost = error if isinstance(error, ServerError) else None
            # Only a complete evaluation clears it; at the end of the epoch there would be another.
            self.control.should_evaluate = False
            self.control.should_save = True
            self.control.should_training_stop = True
            return {}
        return metrics

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """Gather adapters over a sharded base, in which all processes must take part.

        transformers gathers only models that it sharded itself, and peft none.
        """
        spread = self.is_distributed_loading_by_transformers
        if spread and causal_lm(self.model) is not self.model:
            state_dict = gather_trained(self.model)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load sharded weights in parts, and report mismatched shapes in one line."""
        if self.is_distributed_loading_by_transformers:
            load_shards(self.model, None, Path(resume_from_checkpoint) / SHARDS)
            return
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise InputError(
                f"{resume_from_checkpoint}: its weights have other shapes than the student; "
                "continue the run with its original model"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the objective too: on_train_begin comes after the first values are logged."""
        with self._without_projectors():
            if checkpoint is not None and self.is_distributed_loading_by_transformers:
                folder = Path(checkpoint)
                load_shards(self.model, self.optimizer.optimizer, folder / SHARDS)
                self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            if self.features is not None:
                self.features.load(Path(checkpoint), self.optimizer.optimizer)
            self._set_present_rates()
            self.load_objective(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the scale of fp16; in other types the Trainer would fail on such a file."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _set_present_rates(self) -> None:
        """Set the learning rate of the next step from the schedule.

        The stored rate is of a shorter schedule if a finished run is trained further; otherwise
        it is the same.
        """
        schedule = self.lr_scheduler
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            return
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        rates = [base * by for base, by in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates  # shown in the log

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save every process's part; the Trainer would save only that of the main process."""
        if self.features is not None and self.args.should_save:
            self.features.save(Path(output_dir), self.optimizer.optimizer)
        with self._without_projectors():
            if not self.is_distributed_loading_by_transformers:
                super()._save_optimizer_and_scheduler(output_dir)
                return
            save_shards(self.model, self.optimizer.optimizer, Path(output_dir) / SHARDS)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _without_projectors(self) -> AbstractContextManager[None]:
        """Keep the projectors' part of the optimiser in a file of its own."""
        if self.features is None:
            return nullcontext()
        return self.features.apart(self.optimizer.optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Complete the checkpoint before older ones are removed; on_save comes after that."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own file
        procedure = None if self.session is None else self.session.state_dict()
        mean = None
        if isinstance(self.teacher, MeanTeacher | MeanAdapters):
            mean = self.teacher.state()
        if self.args.should_save and not self.args.save_only_model:
            folder = checkpoint_at(Path(self.args.output_dir), self.state.global_step)
            save_objective(folder, self.objective, self.guard, procedure)
            if mean is not None:
                save_mean(mean, folder)
            mark_complete(folder)
        if self.args.should_save:
            best = None
            if self.state.best_global_step:  # not the recorded path: the run may have been moved
                best = str(checkpoint_at(Path(self.args.output_dir), self.state.best_global_step))
            # Ordered by step: with a clock that jumps back, the newest one would be removed.
            rotate_checkpoints(self.args.output_dir, limit, best, use_mtime=False)
