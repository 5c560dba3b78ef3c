"""The trainer of a run, with its progress display and records."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.config.sections import KD_RATIO
from kdrun.files import write_text
from kdrun.losses.build import build_loss, build_weighting
from kdrun.run import folder as runs
from kdrun.run.arguments import settle, training_arguments
from kdrun.run.check import names_writer, procedure_of
from kdrun.run.features import describe_features, open_features
from kdrun.run.precision import autocast_type
from kdrun.run.publish import reporting_hub
from kdrun.run.trackers import place_logs

if TYPE_CHECKING:
    import torch

    from kdrun.config.sections import RunConfig
    from kdrun.config.training_sections import TrainingConfig
    from kdrun.run.load import Loaded
    from kdrun.run.prepare import Prepared
    from kdrun.run.record import Record
    from kdrun.run.start import Start
    from kdrun.training.progress import ShowProgress, TokenRate
    from kdrun.training.trainer import DistillTrainer


@dataclass(frozen=True)
class Built:
    """A run that is ready to train.

    Attributes:
        config: configuration, including automatic choices.
        trainer: the trainer.
        rate: measures supervised tokens per second.
        progress: displays the steps.
    """

    config: RunConfig
    trainer: DistillTrainer
    rate: TokenRate
    progress: ShowProgress


def build(config: RunConfig, prepared: Prepared, loaded: Loaded, start: Start) -> Built:
    """Build a trainer from models, rows and loss, without writing anything.

    Args:
        config: configuration of the run.
        prepared: provides the examples.
        loaded: provides the models.
        start: provides folder and processes.
    """
    from kdrun.data.collate import Collator
    from kdrun.data.origins import Numbered
    from kdrun.training.trainer import DistillTrainer

    pair, examples = prepared.pair, prepared.examples
    arguments = training_arguments(
        config.optimizer,
        config.training,
        start.folder / runs.CHECKPOINTS,
        config.trainer.arguments,
    )
    width = loaded.student.get_output_embeddings().weight.shape[1]
    count = len(examples.train)  # type: ignore[arg-type]
    config = settle(config, pair.vocab_size, width, arguments.device, count)
    if config.training.fsdp:
        _shard(loaded, autocast_type(config))
    with reporting_hub(arguments):
        trainer = DistillTrainer(
            model=loaded.student,
            teacher=loaded.teacher.training,
            loss=build_loss(config.loss, pair.vocab_size),
            token_weight=build_weighting(config.token_weight),
            kd_ratio=config.loss.schedules.get(KD_RATIO, config.loss.kd_ratio),
            args=arguments,
            data_collator=Collator(pair.tokenizer.pad_token_id),
            train_dataset=examples.stream or Numbered(examples.train),
            eval_dataset=examples.held_out,
            processing_class=pair.tokenizer,
            procedure=procedure_of(config),
            sampling=prepared.sampling,
            features=open_features(config, loaded.teacher.training, loaded.student),
        )
    arguments.save_only_model = False  # SavingTrainer keeps the optimiser's parts as well
    trainer.eval_teacher = evaluation = loaded.teacher.evaluation
    if evaluation is not None and evaluation is not trainer.teacher:
        evaluation.to(arguments.device)
    _begin_procedure(trainer, config, prepared, start)
    _guard(trainer, config.training, prepared, start)
    _tell(trainer, start)
    _tell_padding(config, prepared, start)
    rate, show = _listen(trainer, config.training, start)
    return Built(config, trainer, rate, show)


def _shard(loaded: Loaded, computed_in: torch.dtype | None) -> None:
    from kdrun.models.heads import FrozenTeacher, causal_lm
    from kdrun.models.shard import shard

    shard(causal_lm(loaded.student), computed_in)
    for live in dict.fromkeys((loaded.teacher.training, loaded.teacher.evaluation)):
        if isinstance(live, FrozenTeacher):
            shard(live.model)


def _begin_procedure(
    trainer: DistillTrainer, config: RunConfig, prepared: Prepared, start: Start
) -> None:
    """Pass a procedure its inputs besides the trainer's models, and let it prepare the rows."""
    from kdrun.data.token_cache import TokenCache

    session = trainer.session
    if session is None:
        return
    cache = TokenCache.at(config.data.cache_dir)
    session.answers_folder = None if cache is None else cache.folder
    session.text = prepared.text
    session.say = start.say
    if names_writer(config):
        from kdrun.run.served import open_writers

        open_writers(session, config, start)
    trainer.train_dataset = session.procedure.prepare(trainer.train_dataset, session)


def _guard(
    trainer: DistillTrainer, training: TrainingConfig, prepared: Prepared, start: Start
) -> None:
    from kdrun.training.guard import LossGuard

    trainer.guard = LossGuard(
        skip=training.nan_loss == "skip",
        limit=training.max_skipped_steps,
        name_rows=(prepared.examples.stream or prepared.examples.origins).name,
        say=start.say,
    )


def _tell(trainer: DistillTrainer, start: Start) -> None:
    """Report how logits are computed, the loss of experts, and where the run resumes."""
    for name, split in trainer.splits.items():
        if split.reason is not None:
            start.console.print(f"{name}: uses chunks of its full logits: {split.reason}")
    if trainer.features is not None:
        start.say(describe_features(trainer.features.term))
    if trainer.balancing.note is not None:
        start.say(trainer.balancing.note)
    if start.resume:
        for note in start.notes:
            start.say(note)
        if start.checkpoint is None:
            start.console.print("no complete checkpoint: the run starts over")


def _tell_padding(config: RunConfig, prepared: Prepared, start: Start) -> None:
    """Report how much of the batches of single conversations is padding."""
    from kdrun.data.padding import BY_LENGTH, describe_padding
    from kdrun.data.token_store import Tokens

    training, rows = config.training, prepared.examples.train
    if config.procedure.spec is not None or not isinstance(rows, Tokens):
        return
    note = describe_padding(
        rows.lengths(),
        training.batch_size,
        training.gradient_accumulation_steps,
        config.trainer.arguments.get("train_sampling_strategy") == BY_LENGTH,
    )
    if note is not None:
        start.say(note)


def _listen(
    trainer: DistillTrainer, training: TrainingConfig, start: Start
) -> tuple[TokenRate, ShowProgress]:
    """Replace the Trainer's own display, ahead of trackers."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from kdrun.training.best import Best
    from kdrun.training.callbacks import KeepBest
    from kdrun.training.gradient_parts import GradientParts
    from kdrun.training.progress import ShowProgress, TokenRate

    rate = TokenRate(trainer, time.monotonic)
    show = ShowProgress(start.console)
    # The rate excludes the computation of gradient parts.
    parts = [GradientParts(trainer)] if training.gradient_parts else []
    best = Best.of(training)
    keep = [] if best is None else [KeepBest(best)]
    added: list[Any] = [*parts, rate, show, *keep]
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    for callback in added:
        trainer.add_callback(callback)
    # Placed before trackers, which would otherwise miss what these add to the log.
    trainer.callback_handler.callbacks.sort(key=lambda callback: callback not in added)
    place_logs(trainer, start.folder / runs.TENSORBOARD)
    return rate, show


def begin(built: Built, fresh_student: bool, inputs: Record, start: Start) -> None:
    """Start the run's records and remove any earlier run from the folder.

    Args:
        built: the run, after all checks have passed.
        fresh_student: whether its student is initialised from a seed.
        inputs: record of the rows and models.
        start: provides the folder.
    """
    from kdrun.training.progress import MetricsFile, WriteMetrics

    if not start.world.is_main:
        return
    folder, config = start.folder, built.config
    # Changes are accepted for one resume only.
    data = config.data.model_copy(update={"accept_changes": False})
    kept = config.model_copy(update={"data": data})

    def write() -> MetricsFile:
        write_text(folder / runs.CONFIG, kept.to_yaml())
        inputs.write(folder)
        return MetricsFile(folder / runs.METRICS, start.first_step)

    writer = WriteMetrics(write)
    if not start.resume:
        adapted = config.lora.rank is not None and fresh_student
        written = config.procedure.writer is not None
        keep = [*([runs.BASE] if adapted else []), *([runs.WEIGHTS] if written else [])]
        runs.clear(folder, keep)
        writer.open()
    built.trainer.add_callback(writer)
