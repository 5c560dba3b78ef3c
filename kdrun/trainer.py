"""The transformers.Trainer that distils: any registered loss, mixed with cross-entropy."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from kdlosses import (
    KDObjective,
    KDOutput,
    Schedule,
    TokenLoss,
    calibration_error,
    get_loss,
    measure,
)
from kdrun.data.collate import IGNORE_INDEX, ROW, shift_labels
from kdrun.errors import InputError, TrainingError
from kdrun.loss_guard import BadLoss, LossGuard
from kdrun.models.heads import (
    Consumer,
    FrozenTeacher,
    HeadSplit,
    Teacher,
    call,
    causal_lm,
    find_split,
    install,
)
from kdrun.models.shard import gather_trained, load_shards, save_shards
from kdrun.procedures.base import ROLLOUT, LossRows, Origin, Procedure
from kdrun.procedures.registry import get_procedure
from kdrun.procedures.sampling import Sampling
from kdrun.procedures.session import Place, Session
from kdrun.runs import COMPLETE, SHARDS, write_json, write_text

_MEASURE_COMPILED_FROM = 16384
_LABELS = ("labels", "shift_labels")
_OBJECTIVE = "objective.json"
_SCHEDULER = "scheduler.pt"  # as the Trainer calls it
_PROCEDURE = "procedure.json"


StepBatches = tuple[list[Any], Tensor | int | None]


class DistillTrainer(Trainer):
    """A ``transformers.Trainer`` whose loss is ``(1 - kd_ratio) * CE + kd_ratio * KD``.

    Everything else - optimiser, schedule, accumulation, checkpoints, trackers, devices - is the
    Trainer's. With a ``_chunked`` loss neither model's logits are ever stored as a whole. Batches
    need ``input_ids``, ``attention_mask`` and ``labels`` (Hugging Face's convention, -100 where
    not supervised); ``shift_labels``, where given, are taken as aligned with the logits.

    Args:
        model: the student, a causal language model (also under peft).
        teacher: the teacher, a :class:`kdrun.cache.teacher.CachedTeacher`, or None, which needs
            ``kd_ratio`` 0. It is frozen, in eval mode, and never part of the student, its
            optimiser or its checkpoints.
        loss: a spec such as ``"reverse_kl_chunked"`` or what :func:`kdlosses.get_loss` returns.
        kd_ratio: weight of the distillation loss, in [0, 1], or its schedule.
        procedure: which text is learned from, a spec such as ``"gkd:lambda=0.5"`` or what
            :func:`kdrun.procedures.get_procedure` returns; None learns from the data. It needs a
            live teacher, and the tokenizer as ``processing_class``.
        sampling: how the procedure's answers are sampled.
        args: as for Trainer. ``average_tokens_across_devices`` must be on, its default.
        **options: as for Trainer.

    Attributes:
        teacher: what training distils.
        eval_teacher: what evaluation compares with, by default ``teacher``. It may be set to
            another or to None; measures that need a teacher are then None. It has to give full
            distributions.
        session: the procedure at work; None without one.
        step_batches: the micro-batches of the present step, and its supervised tokens.
        guard: what is done about a loss that is not finite; by default training stops.

    Raises:
        ValueError: no teacher at a ``kd_ratio`` above 0, tokens averaged per device, or options
            that would have no effect.
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
        **options: Any,
    ) -> None:
        objective = KDObjective(get_loss(loss) if isinstance(loss, str) else loss, kd_ratio)
        if teacher is None and objective.needs_teacher:
            raise ValueError(f"teacher: needed at kd_ratio {kd_ratio}, got None")
        if args is not None and not args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices: must be on; otherwise the loss depends on how the "
                "tokens are spread over devices"
            )
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor: the class loss takes no smoothed labels; leave it at 0"
            )
        for name in ("compute_metrics", "compute_loss_func"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name}: is never called; the loss is given as loss, and evaluation measures "
                    "without predictions that it could be given"
                )
        self.student_split: HeadSplit = find_split(model)
        install(model, self.student_split)
        self.objective = objective
        super().__init__(model=model, args=args, **options)
        # Of several GPUs one process takes the first, not torch's DataParallel, which deals a batch
        # out to replicas: labels and teacher are one process's.
        self.args._n_gpu = min(self.args.n_gpu, 1)
        self._train_batch_size = self.args.train_batch_size
        self.add_callback(_MoveToEpoch(self))
        self.add_callback(_Advance(self))
        if isinstance(teacher, nn.Module):
            teacher = FrozenTeacher(teacher, find_split(teacher))
        self.teacher: Teacher | None = teacher
        self.eval_teacher: Teacher | None = teacher
        if teacher is not None:
            teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = True
        self.args.logging_nan_inf_filter = False  # it would log an old value in place of a NaN
        self.supervised_tokens = 0
        self.guard = LossGuard()
        terms = len(self.objective.loss.terms)
        self._shares = torch.zeros(2 + terms, device=self.args.device)
        self._step_terms = torch.zeros(terms, device=self.args.device)
        self._moving_values: dict[str, float] = {}
        self._logged_step = 0
        self._origin_tokens = torch.zeros(len(Origin), dtype=torch.int64, device=self.args.device)
        self.session: Session | None = None
        if procedure is not None:
            self.session = self._open_session(procedure, sampling or Sampling())
            self.add_callback(_TellProcedure(self.session))
        self.step_batches: StepBatches = ([], None)
        self._before_step: tuple[Tensor, Tensor] | None = None
        self._left_out = False

    def _open_session(self, procedure: Procedure | str, sampling: Sampling) -> Session:
        teacher = self.teacher.model if isinstance(self.teacher, FrozenTeacher) else None
        if teacher is None:
            raise ValueError("procedure: needs a live teacher, got none")
        if self.processing_class is None:
            raise ValueError("procedure: needs the tokenizer as processing_class, got None")
        student = causal_lm(self.model)
        heads = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
        given = self.objective.loss.vocab_size
        return Session(
            procedure=get_procedure(procedure) if isinstance(procedure, str) else procedure,
            settings=sampling,
            student=student,
            teacher=teacher,
            tokenizer=self.processing_class,
            vocab_size=min([*heads, *([] if given is None else [given])]),
            seed=self.args.seed,
            place=Place(
                self.accelerator.process_index,
                self.accelerator.num_processes,
                self.args.train_batch_size,
            ),
        )

    @property
    def splits(self) -> dict[str, HeadSplit]:
        """How the models were split into backbone and head, by ``student`` and ``teacher``."""
        splits = {"student": self.student_split}
        return splits if self.teacher is None else {**splits, "teacher": self.teacher.split}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> StepBatches:
        """The micro-batches of a step, and their supervised tokens over all processes.

        A procedure may put other rows in their place; tokens are counted on what is learned from.
        """
        if self.session is None:
            self.step_batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        else:
            self.step_batches = self._written_batches(
                self.session, list(islice(epoch_iterator, num_batches)), device
            )
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
        """The objective of a micro-batch, over the supervised tokens of the whole step."""
        outputs = self._outputs(model, inputs, num_items_in_batch)
        both = torch.stack([outputs["class_loss"], outputs["kd_loss"]])
        self._shares += torch.cat([both, outputs["kd_terms"]]).detach()
        self._step_terms += outputs["kd_terms"].detach()
        self.supervised_tokens += int(outputs["num_tokens"])
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP average gradients
        return (loss, outputs) if return_outputs else loss

    def backward_at(self, kd_ratio: float, inputs: dict[str, Any]) -> None:
        """Add a micro-batch's gradients at another ratio; no figure of the training counts it.

        Args:
            kd_ratio: 0 for those of cross-entropy, 1 for those of the loss.
            inputs: one of :attr:`step_batches`.
        """
        kept, self.objective.kd_ratio = self.objective.kd_ratio, kd_ratio
        _, tokens = self.step_batches
        try:
            with self.compute_loss_context_manager():
                outputs = self._outputs(
                    self.model_wrapped, self._prepare_inputs(inputs), tokens, watched=False
                )
            self.accelerator.backward(outputs["loss"] * self.accelerator.num_processes)
        finally:
            self.objective.kd_ratio = kept

    def _outputs(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        step_tokens: Tensor | int | None,
        watched: bool = True,
    ) -> dict[str, Tensor]:
        """Losses and tokens of a micro-batch."""
        inputs = dict(inputs)
        rollout = inputs.pop(ROLLOUT, None)
        labels, features = _split_inputs(inputs)
        ratio = self.objective.kd_ratio
        teacher = None
        if self.teacher is not None and ratio > 0:
            teacher = self.teacher.source(**features, shift_labels=labels)

        def evaluate(student: Any) -> KDOutput:
            if rollout is None or self.session is None:
                out: KDOutput = self.objective(student, teacher, labels, step_tokens)
                return out
            return self.session.procedure.loss(
                LossRows(
                    student=student,
                    teacher=teacher,
                    labels=labels,
                    origins=rollout["origins"],
                    values=rollout["values"],
                    objective=self.objective,
                    step_tokens=step_tokens,
                    origin_tokens=self._origin_tokens,
                )
            )

        def consume(student: Any) -> dict[str, Tensor]:
            out = evaluate(student)
            zeros = out.class_loss.new_zeros(len(self.objective.loss.terms))
            if watched:
                self._watch(out, lambda only: self.objective(student, teacher, only), inputs)
            return {
                "loss": out.loss,
                "class_loss": out.class_loss,
                "kd_loss": zeros.sum() if out.kd_loss is None else out.kd_loss,
                "kd_terms": zeros if out.kd_terms is None else out.kd_terms,
                "num_tokens": out.num_tokens,
            }

        return call(model, self._apart(consume), **features)

    def _watch(
        self, out: KDOutput, again: Callable[[Tensor], KDOutput], inputs: dict[str, Any]
    ) -> None:
        """Look whether a loss is finite, and which rows it comes from where it is not.

        Args:
            out: of the whole micro-batch.
            again: the same for other labels; it is asked for each row alone.
            inputs: the batch.
        """
        value = out.loss.detach().item()
        if math.isfinite(value):
            return
        labels, _ = _split_inputs(inputs)
        rows = []
        for place, number in enumerate(inputs[ROW].tolist() if ROW in inputs else ()):
            only = torch.full_like(labels, IGNORE_INDEX)
            only[place] = labels[place]
            with torch.no_grad():
                if not math.isfinite(again(only).loss.item()):
                    rows.append(number)
        kd = None if out.kd_loss is None else out.kd_loss.item()
        self.guard.note(BadLoss(value, out.class_loss.item(), kd, tuple(rows)))

    def begin_step(self) -> None:
        """Remember the sums of the log, which a step that is left out has no part in."""
        self._before_step = (self._tr_loss.clone(), self._shares.clone())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # A scaler of fp16 leaves out such a step itself, and lowers its scale for the next.
        if self.accelerator.scaler is None:
            self.guard.note_gradient(float(norm))
        return norm

    def end_step(self) -> None:
        """Leave the step out where loss or gradient is not finite, before the optimiser sees it.

        Raises:
            TrainingError: it is not, and training is to stop.
        """
        step = self.state.global_step + 1
        self._left_out = self.guard.leaves_out(step, self.accelerator)
        if not self._left_out:
            return
        # Without gradients an optimiser of torch touches neither weights nor its own state.
        self.model.zero_grad(set_to_none=True)
        assert self._before_step is not None, "a step has a beginning"
        for total, before in zip((self._tr_loss, self._shares), self._before_step, strict=True):
            total.copy_(before)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds class loss and KD loss, averaged over the steps since the last line.

        Also the terms of a weighted sum, the values in the last step of what is scheduled or
        carries state, and the number of steps that were left out, which no mean counts.
        """
        steps = self.state.global_step - self._logged_step
        if "loss" in logs and steps:
            logs = self._training_line(dict(logs), steps)
            self._shares.zero_()
            self._logged_step = self.state.global_step
        super().log(logs, start_time)

    def _training_line(self, logs: dict[str, Any], steps: int) -> dict[str, Any]:
        loss = logs.pop("loss")
        skipped = self.guard.take_unlogged()
        if skipped:
            loss *= steps / max(1, steps - skipped)  # it was divided by all steps
            steps -= skipped
            logs["skipped_steps"] = skipped
            if not math.isfinite(logs.get("grad_norm", 0.0)):  # that of the last step
                del logs["grad_norm"]
        if not steps:
            return logs
        shares = (self.accelerator.reduce(self._shares) / steps).tolist()
        return {
            "loss": loss,
            "class_loss": shares[0],
            "kd_loss": shares[1] if self.objective.needs_teacher else None,
            **self._named_terms("kd_loss", shares[2:]),
            **{key: x for key, x in self._moving_values.items() if math.isfinite(x)},
            **({} if self.session is None else self.session.figures()),
            **logs,
        }

    def begin_log(self, step: int) -> None:
        """Let the means of the next line begin after a step."""
        self._logged_step = step
        self._shares.zero_()

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measures the student: sums over supervised tokens, not means of means."""
        model = self.model_wrapped if self.is_in_train else self.model
        was_training = model.training
        model.eval()
        sums: Tensor | None = None
        rows = 0
        try:
            for number, batch in enumerate(dataloader):
                inputs = self._prepare_inputs(batch)
                rows += self._silence_repeats(number, inputs, len(dataloader.dataset))
                with torch.no_grad():
                    found = self._measure(model, inputs)
                sums = found if sums is None else sums + found
        finally:
            model.train(was_training)
        assert sums is not None, "a data loader has a batch"
        metrics = self._metrics(self.accelerator.reduce(sums))
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=rows)

    def _silence_repeats(self, number: int, inputs: dict[str, Any], total: int) -> int:
        """Ignore rows that only fill up the last round of several processes.

        accelerate deals out whole batches, batch ``k`` to rank ``k % world``, and begins anew with
        the first rows where a batch or a rank would otherwise go without: they would count twice.

        Args:
            number: of the batch among those of this process.
            inputs: the batch; its labels are changed.
            total: rows of the data set.

        Returns:
            Rows that count.
        """
        count: int = len(inputs["input_ids"])
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if world == 1:
            return count
        first = (number * world + rank) * self.args.eval_batch_size
        kept: int = min(count, max(0, total - first))
        for name in _LABELS:
            if name in inputs:
                inputs[name][kept:] = IGNORE_INDEX
        return kept

    def _measure(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        labels, features = _split_inputs(inputs)
        teacher = None
        if self.eval_teacher is not None:
            teacher = self.eval_teacher.source(**features, shift_labels=labels)

        def consume(student: Any) -> dict[str, Tensor]:
            chunking = self.objective.loss.chunking
            eager = student.vocab_size < _MEASURE_COMPILED_FROM or (
                chunking is not None and chunking.compiled is False
            )
            compiled = False if eager else None
            found = measure(self.objective.loss, student, teacher, labels, compiled=compiled)
            columns = (
                found.num_tokens,
                found.cross_entropy,
                found.kd,
                found.forward_kl,
                found.reverse_kl,
                found.top1_agreement,
            )
            zero = found.cross_entropy.new_zeros(())
            terms = zero.expand(len(self.objective.loss.terms))
            sums = torch.stack([zero if column is None else column for column in columns])
            kd_terms = terms if found.kd_terms is None else found.kd_terms
            return {"sums": torch.cat([sums, kd_terms, found.calibration.flatten()])}

        return call(model, self._apart(consume), **features)["sums"]

    def _apart(self, consume: Consumer) -> Consumer:
        """A consumer that is no part of the model's compiled graphs; losses compile their own."""
        if not self.args.torch_compile:
            return consume
        apart: Consumer = torch.compiler.disable(consume)  # type: ignore[no-untyped-call]
        return apart

    def _metrics(self, sums: Tensor) -> dict[str, float | None]:
        tokens = sums[0].item()
        if tokens == 0:
            raise TrainingError("the evaluation rows hold no supervised token")
        columns, calibration = sums.tensor_split([6 + len(self.objective.loss.terms)])
        ce, kd, forward_kl, reverse_kl, agreement, *terms = (columns[1:] / tokens).tolist()
        ratio = self.objective.kd_ratio
        with_teacher = self.eval_teacher is not None
        loss = (1 - ratio) * ce + ratio * kd if ratio > 0 else ce
        return {
            "loss": loss if with_teacher or ratio == 0 else None,
            "ce": ce,
            "kd_loss": kd if with_teacher else None,
            **(self._named_terms("kd_loss", terms) if with_teacher else {}),
            "forward_kl": forward_kl if with_teacher else None,
            "reverse_kl": reverse_kl if with_teacher else None,
            "top1_agreement": agreement if with_teacher else None,
            "calibration_error": calibration_error(calibration.view(3, -1)).item(),
            "tokens": int(tokens),
        }

    def _named_terms(self, prefix: str, values: list[float]) -> dict[str, float]:
        """The terms of a sum by name; a single loss is its own sum and adds nothing."""
        terms = self.objective.loss.terms
        if len(terms) == 1:
            return {}
        return {f"{prefix}/{term.name}": x for term, x in zip(terms, values, strict=True)}

    def advance_objective(self) -> None:
        """Move schedules and state on, at the end of an optimiser step.

        A step that was left out moves the schedules, which follow the number of the step, alone.
        """
        if self._left_out:
            self.move_schedules()
        else:
            self._moving_values = self.objective.moving_values
            values = None
            if self.objective.loss.stateful and self.objective.kd_ratio > 0:
                values = self.accelerator.reduce(self._step_terms).tolist()
            self.objective.advance(self._progress, values)
        self._step_terms.zero_()

    def move_schedules(self) -> None:
        """Move schedules to the share of the training that is done; states stay as they are."""
        self.objective.move(self._progress)

    @property
    def _progress(self) -> float:
        done: float = self.state.global_step / max(1, self.state.max_steps)
        return min(1.0, done)

    def load_objective(self, checkpoint: str | Path) -> None:
        """Take schedules, the loss's state and the procedure's back from a checkpoint.

        Raises:
            TrainingError: it was saved for another loss or procedure.
        """
        saved = json.loads((Path(checkpoint) / _OBJECTIVE).read_text(encoding="utf-8"))
        try:
            self.objective.load_state_dict(saved["objective"])
            self.guard.restore(saved["guard"])
        except ValueError as error:
            raise TrainingError(f"{checkpoint}: {error}") from error
        path = Path(checkpoint) / _PROCEDURE
        if self.session is None and not path.is_file():
            return
        if self.session is None or not path.is_file():
            held, wanted = ("without", "has") if self.session else ("with", "has not")
            raise TrainingError(
                f"{checkpoint}: was saved by a run {held} a procedure, which this one {wanted}; "
                "continue it as it was"
            )
        try:
            self.session.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except TrainingError as error:
            raise TrainingError(f"{checkpoint}: {error}") from error

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # transformers gathers models that it sharded itself, and peft gathers none.
        spread = self.is_distributed_loading_by_transformers
        if spread and causal_lm(self.model) is not self.model:
            state_dict = gather_trained(self.model)
            if not self.args.should_save:
                return
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_distributed_loading_by_transformers:
            load_shards(self.model, None, Path(resume_from_checkpoint) / SHARDS)
            return
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise InputError(
                f"{resume_from_checkpoint}: has weights of other sizes than the student; continue "
                "the run with the model that it began with"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_distributed_loading_by_transformers:
            folder = Path(checkpoint)
            load_shards(self.model, self.optimizer.optimizer, folder / SHARDS)
            self.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_objective(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer would save the part of the main process alone.
        save_shards(self.model, self.optimizer.optimizer, Path(output_dir) / SHARDS)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Older checkpoints go only once the new one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process has a file of its own in it
        procedure = None if self.session is None else self.session.state_dict()
        if self.args.should_save and not self.args.save_only_model:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            saved = {"objective": self.objective.state_dict(), "guard": self.guard.state()}
            write_json(folder / _OBJECTIVE, saved)
            if procedure is not None:
                write_text(folder / _PROCEDURE, json.dumps(procedure))
            with open(folder / COMPLETE, "w", encoding="utf-8") as marker:
                marker.write("\n")
                marker.flush()
                os.fsync(marker.fileno())
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(self.args.output_dir, limit, best, use_mtime=True)


class TokenRate(TrainerCallback):
    """Adds ``supervised_tokens_per_second`` to the log: steps only, evaluation left out."""

    def __init__(self, trainer: DistillTrainer, clock: Any) -> None:
        self._trainer = trainer
        self._clock = clock
        self._started = 0.0
        self._first_tokens = 0
        self.seconds = 0.0
        self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of a step."""
        self._started = self._clock()
        self._first_tokens = self._trainer.supervised_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.seconds += self._clock() - self._started
        self.tokens += self._trainer.supervised_tokens - self._first_tokens

    @property
    def rate(self) -> float:
        """Supervised tokens a second of this process, over all steps so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Adds the rate to a line about training."""
        if "loss" in logs:
            logs["supervised_tokens_per_second"] = round(self.rate * args.world_size, 1)


class _MoveToEpoch(TrainerCallback):
    """Tells the training data which epoch it is.

    The loader passes it on in one process only, and not after a resume amid an epoch.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves data that knows epochs; ``state.epoch`` has a fraction after a resume."""
        data = self._trainer.train_dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(int(state.epoch or 0))


class _Advance(TrainerCallback):
    """Looks at the loss before each optimiser step, and moves the objective on after it."""

    def __init__(self, trainer: DistillTrainer) -> None:
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


class _TellProcedure(TrainerCallback):
    """Tells a procedure of each evaluation."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any
    ) -> None:
        """The cross-entropy on held-out rows, which is the same on every process."""
        if state.max_steps == 0 or state.global_step < state.max_steps:  # not after the training
            self._session.evaluated(metrics["eval_ce"])


class StopOnRequest(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once ``requested`` is set."""

    requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the trainer to save and stop."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


def tokens_by_origin(batches: list[dict[str, Any]]) -> Tensor:
    """Supervised tokens of micro-batches by the origin of their rows, ``[len(Origin)]``."""
    found = torch.zeros(len(Origin), dtype=torch.int64)
    for batch in batches:
        labels = batch["shift_labels"] if "shift_labels" in batch else shift_labels(batch["labels"])
        rows = (labels != IGNORE_INDEX).sum(-1).cpu()
        origins = batch.get(ROLLOUT, {}).get("origins", (Origin.DATA,) * len(rows))
        found.index_add_(0, torch.tensor([int(origin) for origin in origins]), rows)
    return found


def _split_inputs(inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = shift_labels(inputs["labels"])
    features = {key: value for key, value in inputs.items() if key not in (*_LABELS, ROW)}
    return labels, features
