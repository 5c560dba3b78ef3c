"""The transformers.Trainer that distils: any registered loss, mixed with cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from kdlosses import (
    FeatureTerm,
    KDObjective,
    Schedule,
    TokenLoss,
    TokenWeight,
    TokenWeighting,
    get_loss,
    get_weight,
)
from kdrun.evaluation.measures import figures, prepare_measures, silence_repeats
from kdrun.models.heads import (
    BALANCING,
    Consumer,
    FrozenTeacher,
    HeadSplit,
    Teacher,
    call,
    causal_lm,
    find_split,
    install,
)
from kdrun.models.mean_teacher import MeanAdapters, MeanTeacher
from kdrun.models.routers import find_balancing
from kdrun.models.self_teacher import SelfTeacher
from kdrun.procedures.base import Origin, Procedure
from kdrun.procedures.registry import get_procedure
from kdrun.procedures.sampling import Sampling, tokens_by_origin
from kdrun.procedures.session import Place, Session
from kdrun.served.client import Client
from kdrun.served.teacher import ServedTeacher
from kdrun.training.callbacks import Advance, KeepSettings, MoveToEpoch, TellProcedure
from kdrun.training.features import HiddenTerm
from kdrun.training.guard import LossGuard
from kdrun.training.log import LossSums
from kdrun.training.loss import StepTokens, prepare_loss
from kdrun.training.saving import EvaluationStopped, SavingTrainer
from kdrun.training.served import AskingAhead

StepBatches = tuple[list[Any], Tensor | int | None]


class DistillTrainer(SavingTrainer):
    """A ``transformers.Trainer`` whose loss is ``(1 - kd_ratio) * CE + kd_ratio * KD``.

    Everything else - optimiser, schedule, accumulation, checkpoints, trackers, devices - is the
    Trainer's. With a ``_chunked`` loss neither model's logits are ever stored in full. Batches
    need ``input_ids``, ``attention_mask`` and ``labels`` (Hugging Face's convention, -100 where
    not supervised); ``shift_labels``, if given, must be aligned with the logits.

    Args:
        model: the student, a causal language model (also under peft).
        teacher: the teacher, a :class:`kdrun.cache.teacher.CachedTeacher`, or None, which needs
            ``kd_ratio`` 0. It is frozen, in eval mode, and never part of the student, its
            optimiser or its checkpoints.
        loss: a spec such as ``"reverse_kl_chunked"`` or a result of :func:`kdlosses.get_loss`.
        kd_ratio: weight of the distillation loss, in [0, 1], or its schedule.
        procedure: which text to learn from, a spec such as ``"gkd:lambda=0.5"`` or a result of
            :func:`kdrun.procedures.get_procedure`; None learns from the data. It needs a
            live teacher, and the tokenizer as ``processing_class``.
        sampling: how the procedure's answers are sampled.
        features: a term on hidden states from :func:`kdlosses.get_features`, which is added to the
            loss at any ``kd_ratio``. It needs a live teacher.
        args: as for Trainer. ``average_tokens_across_devices`` must be on, its default.
        **options: as for Trainer.

    Attributes:
        teacher: the teacher for training.
        eval_teacher: the teacher for evaluation, by default ``teacher``. It may be another one or
            None; measures that need a teacher are then None. It must provide full
            distributions.
        session: session of the procedure; None without one.
        asking_ahead: asks a served teacher for the next batches; None for another teacher.
        step_batches: the micro-batches of the current step, and its supervised tokens.
        guard: handles a loss that is not finite; by default training stops.
        balancing: the load-balancing loss of a student with experts, which training adds.
        stops_evaluating: whether the run was asked to stop, so that an evaluation during training
            is interrupted.
        sums: sums for the means of the next log line.
        features: the term on hidden states; None without one.

    Raises:
        ValueError: no teacher at a ``kd_ratio`` above 0, no live one for ``features``, tokens
            averaged per device, or options that would have no effect.
    """

    # The loss is divided by the supervised tokens of the whole step, not of a micro-batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        teacher: PreTrainedModel | Teacher | None,
        loss: TokenLoss | str = "forward_kl_chunked",
        kd_ratio: float | Schedule = 0.5,
        args: TrainingArguments | None = None,
        procedure: Procedure | str | None = None,
        sampling: Sampling | None = None,
        token_weight: TokenWeight | TokenWeighting | str | None = None,
        features: FeatureTerm | None = None,
        **options: Any,
    ) -> None:
        weight = get_weight(token_weight) if isinstance(token_weight, str) else token_weight
        loss = get_loss(loss) if isinstance(loss, str) else loss
        objective = KDObjective(loss, kd_ratio, weight)
        if teacher is None and objective.needs_teacher:
            raise ValueError(f"teacher: needed at kd_ratio {kd_ratio}, got None")
        _refuse_without_effect(args, options)
        self.student_split: HeadSplit = find_split(model)
        self.balancing = find_balancing(causal_lm(model))
        install(model, self.student_split, balanced=self.balancing.coefficient > 0)
        self.objective = objective
        own = KeepSettings(causal_lm(model))
        super().__init__(model=model, args=args, **options)
        own.restore()
        self.add_callback(own)
        # With several GPUs, one process uses the first and not torch's DataParallel, which splits
        # a batch over replicas: labels and teacher belong to one process.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self._train_batch_size = self.args.train_batch_size
        self.add_callback(MoveToEpoch(self))
        self.add_callback(Advance(self))
        if isinstance(teacher, nn.Module):
            teacher = FrozenTeacher(teacher, find_split(teacher))
        self.teacher: Teacher | None = teacher
        self.eval_teacher: Teacher | None = teacher
        if teacher is not None:
            teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = True
        self.args.logging_nan_inf_filter = False  # it would log an old value instead of a NaN
        self.guard = LossGuard()
        self.features = None if features is None else _open_features(self, features)
        self.sums = LossSums(
            len(self.objective.loss.terms),
            self.args.device,
            balanced=self.balancing.coefficient > 0,
            features=features is not None,
        )
        self._origin_tokens = torch.zeros(len(Origin), dtype=torch.int64, device=self.args.device)
        self.session: Session | None = None
        if procedure is not None:
            self.session = _open_session(self, procedure, sampling or Sampling())
            self.add_callback(TellProcedure(self.session))
        self.asking_ahead: AskingAhead | None = None
        if isinstance(teacher, ServedTeacher):
            self.asking_ahead = AskingAhead(teacher, self.accelerator)
        self.step_batches: StepBatches = ([], None)
        self.stops_evaluating: Callable[[], bool] = lambda: False
        self._loss_before_step: Tensor | None = None
        self._left_out = False

    @property
    def _may_stop(self) -> bool:
        """Return whether an evaluation may be interrupted: no process or procedure needs it."""
        return self.accelerator.num_processes == 1 and self.session is None

    def clients(self) -> list[Client]:
        """Return what asks the servers of the run."""
        asking = [] if self.asking_ahead is None else [self.asking_ahead.teacher.asked.engine]
        writers = () if self.session is None else self.session.served.values()
        return [engine.client for engine in (*asking, *(writer.engine for writer in writers))]

    @property
    def splits(self) -> dict[str, HeadSplit]:
        """How the models were split into backbone and head, for ``student`` and ``teacher``."""
        splits = {"student": self.student_split}
        return splits if self.teacher is None else {**splits, "teacher": self.teacher.split}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> StepBatches:
        """Return the micro-batches of a step, and their supervised tokens over all processes.

        A procedure may replace the rows; tokens are counted on the rows used for training.
        """
        asking, needed = self.asking_ahead, self.objective.kd_ratio > 0
        if asking is not None and self.session is None:
            steps = max(1, self.state.max_steps - self.state.global_step)
            most = steps * self.args.gradient_accumulation_steps
            epoch_iterator = asking.in_training(epoch_iterator, most, needed)
        with nullcontext() if self.session is None else self.session.undoing():
            if self.session is None:
                self.step_batches = super().get_batch_samples(epoch_iterator, num_batches, device)
            else:
                self.step_batches = self._written_batches(
                    self.session, list(islice(epoch_iterator, num_batches)), device
                )
            if asking is not None and needed:
                asking.settle(self.step_batches[0])
        return self.step_batches

    def _written_batches(
        self, session: Session, batches: list[Any], device: torch.device
    ) -> StepBatches:
        if not batches:
            return batches, None
        session.step, session.steps = self.state.global_step, max(1, self.state.max_steps)
        session.kd_ratio = self.objective.kd_ratio
        batches = session.micro_batches(batches)
        self._origin_tokens = self.accelerator.reduce(tokens_by_origin(batches).to(device))
        return batches, self._origin_tokens.sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the objective of a micro-batch, over the supervised tokens of the whole step."""
        outputs = self._outputs(model, inputs, num_items_in_batch, self.guard, self.features)
        loss = outputs["loss"]
        if BALANCING in outputs:  # a mean over the micro-batches and processes of the step
            parts = 1 if num_items_in_batch is None else max(1, len(self.step_batches[0]))
            share = outputs[BALANCING] / (parts * self.accelerator.num_processes)
            outputs[BALANCING] = share
            loss = loss + self.balancing.coefficient * share
        self.sums.add(outputs)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP average gradients
        return (loss, outputs) if return_outputs else loss

    def backward_at(self, kd_ratio: float, inputs: dict[str, Any]) -> None:
        """Add a micro-batch's gradients at another ratio, without changing any training metric.

        Args:
            kd_ratio: 0 for the gradients of cross-entropy, 1 for those of the loss.
            inputs: one of :attr:`step_batches`.
        """
        kept, self.objective.kd_ratio = self.objective.kd_ratio, kd_ratio
        _, tokens = self.step_batches
        try:
            with self.compute_loss_context_manager():
                outputs = self._outputs(
                    self.model_wrapped, self._prepare_inputs(inputs), tokens, None
                )
            self.accelerator.backward(outputs["loss"] * self.accelerator.num_processes)
        finally:
            self.objective.kd_ratio = kept

    def _outputs(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        step_tokens: Tensor | int | None,
        guard: LossGuard | None,
        hidden: HiddenTerm | None = None,
    ) -> dict[str, Tensor]:
        """Compute losses and tokens of a micro-batch."""
        procedure = None if self.session is None else self.session.procedure
        tokens = StepTokens(step_tokens, self._origin_tokens)
        with nullcontext() if hidden is None else hidden.recording() as recording:
            consume, features = prepare_loss(
                inputs, self.objective, self.teacher, procedure, tokens, guard, hidden is not None
            )
            if recording is not None:
                consume = recording.adding_to(consume, inputs, step_tokens, guard)
            return call(model, self._apart(consume), **features)

    def _apart(self, consume: Consumer) -> Consumer:
        """Exclude a consumer from the model's compiled graphs; losses compile their own."""
        if not self.args.torch_compile:
            return consume
        apart: Consumer = torch.compiler.disable(consume)  # type: ignore[no-untyped-call]
        return apart

    def begin_step(self) -> None:
        """Remember the sums of the log, to exclude a step that is skipped."""
        self._loss_before_step = self._tr_loss.clone()
        self.sums.begin_step()

    def end_step(self) -> None:
        """Skip a step whose loss or gradient is not finite, before the optimiser step.

        Raises:
            TrainingError: it is not finite, and training must stop.
        """
        step = self.state.global_step + 1
        self._left_out = self.guard.leaves_out(step, self.accelerator)
        if not self._left_out:
            return
        # Without gradients, torch optimisers change neither weights nor their own state.
        self.model.zero_grad(set_to_none=True)
        if self.features is not None:
            self.features.clear()
        assert self._loss_before_step is not None, "a step has a beginning"
        self._tr_loss.copy_(self._loss_before_step)
        self.sums.leave_out_step()

    def advance_objective(self) -> None:
        """Advance schedules and state at the end of an optimiser step.

        A skipped step advances only the schedules, which follow the step number.
        """
        if self.features is not None:
            self.features.clear()
        stateful = self.objective.loss.stateful and self.objective.kd_ratio > 0
        terms = self.sums.take_step_terms(self.accelerator, stateful and not self._left_out)
        weighed = self.objective.needs_weight_sums and self.objective.kd_ratio > 0
        weights = self.sums.take_step_weights(self.accelerator, weighed and not self._left_out)
        if self._left_out:
            self.move_schedules()
        else:
            if isinstance(self.teacher, MeanTeacher | MeanAdapters):
                self.teacher.follow(self.model)
            self.sums.moving_values = self.objective.moving_values
            self.objective.advance(self._progress, terms, weights)

    def move_schedules(self) -> None:
        """Move schedules to the completed share of training; states are unchanged."""
        self.objective.move(self._progress)

    @property
    def _progress(self) -> float:
        done: float = self.state.global_step / max(1, self.state.max_steps)
        return min(1.0, done)

    def begin_log(self, step: int) -> None:
        """Start the means of the next log line after a step."""
        self.sums.begin_line(step)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add class loss and KD loss, averaged over the steps since the last line.

        Also add the terms of a weighted sum, the last values of everything scheduled or stateful,
        and the number of skipped steps, which no mean includes.
        """
        step = self.state.global_step
        if "loss" in logs and self.sums.has_steps(step):
            skipped = self.guard.take_unlogged()
            written = {} if self.session is None else self.session.figures()
            logs = self.sums.line(logs, step, skipped, self.objective, self.accelerator, written)
            self.begin_log(step)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the student with sums over supervised tokens, not means of means."""
        model = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        model.eval()
        sums: Tensor | None = None
        rows = 0
        try:
            for number, batch in enumerate(self._asked_ahead(dataloader)):
                if self.is_in_train and self._may_stop and self.stops_evaluating():
                    raise EvaluationStopped
                inputs = self._prepare_inputs(batch)
                rows += silence_repeats(
                    inputs,
                    number=number,
                    total=len(dataloader.dataset),
                    batch_size=self.args.eval_batch_size,
                    rank=self.accelerator.process_index,
                    world=self.accelerator.num_processes,
                )
                with self.asking_ahead.agreeing() if self.asking_ahead else nullcontext():
                    consume, features = prepare_measures(
                        inputs, self.objective.loss, self.eval_teacher
                    )
                with torch.no_grad(), self.accelerator.autocast():
                    found = call(model, self._apart(consume), **features)["sums"]
                sums = found if sums is None else sums + found
        finally:
            model.train(was_training)
        assert sums is not None, "a data loader has a batch"
        metrics = figures(self.accelerator.reduce(sums), self.objective, self.eval_teacher)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=rows)

    def _asked_ahead(self, loader: Any) -> Any:
        """Return the batches of an evaluation, asked for ahead where a server has the teacher."""
        if self.asking_ahead is None or self.eval_teacher is not self.asking_ahead.teacher:
            return loader
        return self.asking_ahead.in_evaluation(loader)


def _refuse_without_effect(args: TrainingArguments | None, options: dict[str, Any]) -> None:
    if args is not None and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices: must be on; otherwise the loss depends on how the "
            "tokens are distributed across devices"
        )
    if args is not None and args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor: the class loss does not support label smoothing; leave it at 0"
        )
    for name in ("compute_metrics", "compute_loss_func"):
        if options.get(name) is not None:
            raise ValueError(
                f"{name}: is never called; pass the loss as loss (evaluation returns no "
                "predictions)"
            )


def _open_features(trainer: DistillTrainer, term: FeatureTerm) -> HiddenTerm:
    if not isinstance(trainer.teacher, FrozenTeacher):
        raise ValueError("features: need the hidden states of a live teacher, got none")
    if trainer.args.torch_compile:
        raise ValueError("features: hidden states are not recorded in compiled models")
    return HiddenTerm(term, trainer.teacher, trainer.model, trainer.args.device)


def _open_session(
    trainer: DistillTrainer, procedure: Procedure | str, sampling: Sampling
) -> Session:
    given = trainer.teacher
    if not isinstance(given, FrozenTeacher | SelfTeacher | ServedTeacher):
        raise ValueError("procedure: needs a live or a served teacher, got neither")
    teacher = given.model if isinstance(given, FrozenTeacher) else None
    if trainer.processing_class is None:
        raise ValueError("procedure: needs the tokenizer as processing_class, got None")
    student = causal_lm(trainer.model)
    heads = [student.get_output_embeddings().weight.shape[0]]
    if isinstance(given, ServedTeacher):
        heads.append(given.width)
    elif isinstance(given, FrozenTeacher):
        heads.append(given.model.get_output_embeddings().weight.shape[0])
    shared = trainer.objective.loss.vocab_size
    return Session(
        procedure=get_procedure(procedure) if isinstance(procedure, str) else procedure,
        settings=sampling,
        student=student,
        teacher=teacher,
        tokenizer=trainer.processing_class,
        vocab_size=min([*heads, *([] if shared is None else [shared])]),
        seed=trainer.args.seed,
        place=Place(
            trainer.accelerator.process_index,
            trainer.accelerator.num_processes,
            trainer.args.train_batch_size,
        ),
    )
