"""One run from its configuration to its folder: what ``kdrun`` and ``kdrun.distill`` do."""

from __future__ import annotations

import json
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun import runs
from kdrun.cache.choose import check_cached_rows, choose_teacher
from kdrun.config import KD_RATIO, LossConfig, RunConfig, validate
from kdrun.data.prepare import (
    RawRows,
    check_packed_rows,
    encode_for,
    pack_training,
    read_rows,
)
from kdrun.environment import git_state, versions
from kdrun.errors import InputError, Interrupted
from kdrun.models.adapters import add_adapters, check_peft, describe_adapters
from kdrun.models.quantize import check_quantization
from kdrun.pairs import (
    Pair,
    check_context,
    describe_cut,
    describe_model,
    find_pair,
    load_student,
    locate_pair,
)
from kdrun.procedures.run import leave_room, procedure_of, read_text
from kdrun.processes import World, check_deepspeed
from kdrun.quiet import quiet_libraries
from kdrun.trackers import check_tracker, place_logs

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kdlosses import TokenLoss
    from kdrun.trainer import DistillTrainer

_COMPILE_FROM_ELEMENTS = 2e8


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        folder: the run's folder.
        summary: the content of ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]

    @property
    def student(self) -> Path:
        """The folder of the trained student."""
        return self.folder / runs.STUDENT


def distill(
    config: RunConfig | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Distil a student, as the command ``kdrun`` does.

    Args:
        config: a :class:`RunConfig` or its sections as a mapping.
        resume: continue the run in ``output.dir`` from its newest complete checkpoint.
        overwrite: replace the run in ``output.dir``.
        console: where progress is shown; by default standard error.

    Returns:
        The run's folder and its summary.

    Raises:
        InputError: wrong input; nothing was written over.
        TrainingError: training failed, such as a loss that became NaN.
        Interrupted: stopped by Ctrl-C, after a checkpoint was saved.
        UnwritableError: the disk is full, or the folder cannot be written any more.
    """
    if not isinstance(config, RunConfig):
        from kdrun.config import complete_pair

        config = validate(complete_pair(config))
    # What is cheap to check is checked before anything heavy is imported or written.
    check_name(config.loss.spec)
    check_peft(config.lora)
    procedure_of(config)
    check_tracker(config.training.report_to)
    check_quantization(config)
    check_deepspeed(config.training.deepspeed)
    locate_pair(config.model)
    rows = read_rows(config.data)
    check_cached_rows(config, rows)
    check_packed_rows(config.data, rows)
    build_loss(config.loss, vocab_size=None)
    world = World(config.training.fsdp)
    if config.training.fsdp and config.lora.merge:
        raise InputError(
            "lora.merge=true: not with training.fsdp=true; leave it out and merge the saved adapter"
        )
    folder = Path(world.share(str(runs.choose_folder(config.output.dir, config.loss.spec))))
    if world.is_main:
        runs.prepare_folder(folder, resume, overwrite)
    world.wait()

    from kdrun.progress import make_console

    console = console or make_console()
    console.quiet = console.quiet or not world.is_main
    checkpoint = runs.newest_checkpoint(folder) if resume else None
    _check_kind(checkpoint, config.training.fsdp)
    summary = folder / runs.SUMMARY
    trained = checkpoint is not None and runs.is_finished(
        checkpoint, config.training.max_steps, config.training.num_epochs
    )
    if trained and summary.is_file():
        console.print(f"the run in {folder} is finished; nothing is left to do", markup=False)
        return RunResult(folder, json.loads(summary.read_text(encoding="utf-8")))
    with quiet_libraries(), runs.one_line_where_nothing_can_be_written(folder):
        return _run(config, rows, folder, resume, checkpoint, trained, console, world)


def _check_kind(checkpoint: Path | None, fsdp: bool) -> None:
    """Refuse to continue with models spread over processes what began otherwise, or the reverse."""
    if checkpoint is not None and (checkpoint / runs.SHARDS).is_dir() != fsdp:
        was = "without" if fsdp else "with"
        raise InputError(
            f"--resume: {checkpoint} was written {was} training.fsdp=true; continue it likewise"
        )


def check_name(spec: str) -> None:
    """Refuse a spec whose name is registered by no distribution; imports no loss.

    Raises:
        InputError: with a close name.
    """
    from kdlosses import LossSpecError, find_loss, parse_spec

    try:
        for term in parse_spec(spec).terms:
            find_loss(term.name)
    except LossSpecError as error:
        raise InputError(str(error)) from error


def build_loss(config: LossConfig, vocab_size: int | None) -> TokenLoss:
    """The loss of a configuration.

    Raises:
        InputError: an unknown loss, a parameter that it does not take or a value out of bounds.
    """
    from kdlosses import BrokenLossError, LossSpecError, get_loss

    try:
        return get_loss(
            config.spec,
            chunk_size=config.chunk_size,
            temperature=config.temperature,
            temperature_scaling=config.temperature_scaling,
            vocab_size=vocab_size,
            match_curvature=config.match_curvature,
            compiled=config.compiled,
            schedules={key: at for key, at in config.schedules.items() if key != KD_RATIO},
        )
    except (LossSpecError, BrokenLossError) as error:
        raise InputError(str(error)) from error


def _run(
    config: RunConfig,
    rows: RawRows,
    folder: Path,
    resume: bool,
    checkpoint: Path | None,
    trained: bool,
    console: Console,
    world: World,
) -> RunResult:
    from transformers import set_seed

    from kdrun.data.collate import Collator
    from kdrun.data.origins import Numbered
    from kdrun.data.token_cache import TokenCache
    from kdrun.evaluation.answers import ask, choose_questions, mean_scores
    from kdrun.evaluation.measures import held_out_measures
    from kdrun.gradient_parts import GradientParts
    from kdrun.loss_guard import LossGuard
    from kdrun.models.heads import FrozenTeacher, causal_lm
    from kdrun.models.packing import check_packing
    from kdrun.models.shard import shard
    from kdrun.procedures.sampling import Sampling
    from kdrun.progress import ShowProgress, WriteMetrics, before_after
    from kdrun.trainer import DistillTrainer, TokenRate

    started = time.monotonic()
    pair = find_pair(config.model)
    check_context(config, pair)
    examples = encode_for(config, rows, pair.tokenizer, config.data.shift_windows)
    if config.data.packing:
        examples = pack_training(examples, config.data.max_length)
    procedure, sampling = procedure_of(config), None
    if procedure is not None:
        sampling = Sampling.of(config)
        examples = leave_room(examples, sampling, pair.tokenizer)
    text, of_text = read_text(config, pair.tokenizer)
    for note in (*pair.notes, *rows.notes, *examples.notes, *([of_text] if of_text else [])):
        console.print(note, markup=False)
    teacher = choose_teacher(config, pair, examples, build_loss(unchunked(config.loss), None))
    student = load_student(pair, config.model, config.training.seed)
    widths = {"student": student.get_output_embeddings().weight.shape[0], **teacher.widths}
    describe_cut(widths, pair.vocab_size, lambda line: console.print(line, markup=False))
    questions, asked = choose_questions(rows.held_out, pair.tokenizer, config.evaluation, student)
    for line in (*teacher.notes, f"student: {describe_model(student)}"):
        console.print(line, markup=False)
    if asked is not None:
        console.print(asked, markup=False)
    if config.data.packing:
        check_packing(student, str(pair.student))
        if isinstance(teacher.training, FrozenTeacher):
            check_packing(teacher.training.model, str(pair.teacher))
    if config.lora.rank is not None:
        student = _with_adapters(student, pair, config, folder, world)
        console.print(describe_adapters(student, config.lora), markup=False)

    arguments = training_arguments(config, folder)
    if questions and world.size > 1:
        raise InputError(
            "evaluation.answers: not in several processes; set it to 0, and let 'kdrun evaluate' "
            "ask the trained student"
        )
    head = student.get_output_embeddings().weight
    count = len(examples.train)  # type: ignore[arg-type]
    config = settle(config, pair.vocab_size, head.shape[1], arguments.device, count)
    if config.training.fsdp:
        shard(causal_lm(student))
        for live in dict.fromkeys((teacher.training, teacher.evaluation)):
            if isinstance(live, FrozenTeacher):
                shard(live.model)
    trainer = DistillTrainer(
        model=student,
        teacher=teacher.training,
        loss=build_loss(config.loss, pair.vocab_size),
        kd_ratio=config.loss.schedules.get(KD_RATIO, config.loss.kd_ratio),
        args=arguments,
        data_collator=Collator(pair.tokenizer.pad_token_id),
        train_dataset=Numbered(examples.train),
        eval_dataset=examples.held_out,
        processing_class=pair.tokenizer,
        procedure=procedure,
        sampling=sampling,
    )
    arguments.save_only_model = False  # DistillTrainer keeps the optimiser's parts as well
    trainer.eval_teacher = teacher.evaluation
    if trainer.session is not None:
        cache = TokenCache.at(config.data.cache_dir)
        trainer.session.answers_folder = None if cache is None else cache.folder
        trainer.session.text = text
        trainer.session.say = lambda line: console.print(line, markup=False)
        trainer.train_dataset = trainer.session.procedure.prepare(
            trainer.train_dataset, trainer.session
        )
    trainer.guard = LossGuard(
        skip=config.training.nan_loss == "skip",
        limit=config.training.max_skipped_steps,
        name_rows=examples.origins.name,
        say=lambda line: console.print(line, markup=False),
    )
    for name, split in trainer.splits.items():
        if split.reason is not None:
            console.print(f"{name}: chunks of its full logits are used: {split.reason}")
    if resume:
        for name in runs.broken_checkpoints(folder):
            console.print(f"{name} is incomplete and left out", markup=False)
        if checkpoint is None:
            console.print("no complete checkpoint: the run starts anew")
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    rate = TokenRate(trainer, time.monotonic)
    show = ShowProgress(console)
    parts = [GradientParts(trainer)] if config.training.gradient_parts else []
    _replace_callbacks(trainer, *parts, rate, show)  # the rate does not count the parts
    place_logs(trainer, folder / runs.TENSORBOARD)
    if world.is_main:
        if not resume:
            adapted = config.lora.rank is not None and pair.fresh_student
            runs.clear(folder, keep_base=adapted)
        runs.write_text(folder / runs.CONFIG, config.to_yaml())
        metrics = runs.MetricsFile(folder / runs.METRICS, first_step)
        trainer.add_callback(WriteMetrics(metrics))

    before = _before(trainer, folder, resume, world)
    if checkpoint is None:
        # Evaluation drew random numbers, and a run that begins anew does not evaluate again.
        set_seed(config.training.seed)
    if trained:  # the run ended between its last checkpoint and its summary
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.load_objective(str(checkpoint))
        trainer.state.global_step = first_step
    else:
        try:
            _train(trainer, checkpoint, folder)
        finally:
            show.close()
    after = held_out_measures(trainer)
    _save_student(trainer, folder, config.lora.merge)
    if questions:
        answers = ask(causal_lm(student), pair.tokenizer, questions, config.evaluation)
        runs.write_lines(folder / runs.ANSWERS, [answer.line() for answer in answers])
        after |= {f"eval_{name}": value for name, value in mean_scores(answers).items()}
    written = {} if trainer.session is None else trainer.session.figures()
    summary = {
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        **({"procedure": written} if written else {}),
        "skipped_steps": trainer.guard.skipped,
        "supervised_tokens_per_second": round(rate.rate * arguments.world_size, 1),
        "training_seconds": round(rate.seconds, 2),
        "total_seconds": round(time.monotonic() - started, 2),
        "peak_memory_mib": _peak_memory_mib(),
        "seed": config.training.seed,
        "versions": versions(),
        "git": git_state(),
        "command": sys.argv,
    }
    if world.is_main:
        runs.write_json(folder / runs.SUMMARY, summary)
    console.print(before_after(before, after))
    console.print(
        f"{trainer.state.global_step} steps in {rate.seconds:.0f} s "
        f"({summary['supervised_tokens_per_second']:.0f} supervised tokens/s), "
        f"{summary['total_seconds']:.0f} s in all, peak memory {summary['peak_memory_mib']} MiB"
    )
    if trainer.session is not None:
        for line in trainer.session.remarks(written):
            console.print(f"procedure {config.procedure.spec}: {line}", markup=False)
    console.print(f"student: {folder / runs.STUDENT}", markup=False)
    return RunResult(folder, summary)


def training_arguments(config: RunConfig, folder: Path) -> Any:
    """The Trainer's arguments for a configuration."""
    import torch
    from transformers import TrainingArguments

    optimizer, training = config.optimizer, config.training
    return TrainingArguments(
        output_dir=str(folder / runs.CHECKPOINTS),
        max_steps=training.max_steps or -1,
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        activation_checkpointing=training.gradient_checkpointing,
        torch_compile=training.torch_compile,
        learning_rate=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=optimizer.scheduler,
        lr_scheduler_kwargs=dict(optimizer.scheduler_kwargs),
        warmup_steps=optimizer.warmup_steps,
        logging_steps=training.logging_steps,
        eval_strategy="no" if training.eval_steps is None else "steps",
        eval_steps=training.eval_steps,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        # Of models that are spread out the Trainer would accept nothing else; see _run.
        save_only_model=training.fsdp,
        seed=training.seed,
        data_seed=training.seed,
        report_to=training.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        # Without it several processes on a CPU would each train alone, in silence.
        use_cpu=not torch.accelerator.is_available(),
    )


def unchunked(config: LossConfig) -> LossConfig:
    """The same loss as plain autograd, for a look at whether it accepts a teacher."""
    plain = {"spec": config.spec.replace("_chunked", ""), "chunk_size": None, "compiled": None}
    return config.model_copy(update=plain)


def settle(
    config: RunConfig, vocab_size: int, head_width: int, device: torch.device, rows: int
) -> RunConfig:
    """Write down what is chosen automatically, so that a resumed or repeated run rounds alike.

    Args:
        config: of the run.
        vocab_size: tokens that both models share.
        head_width: of the student's hidden states.
        device: where the student is trained.
        rows: of training.
    """
    from kdlosses import automatic_chunk_size, parse_spec

    if not parse_spec(config.loss.spec).chunked:
        return config
    training = config.training
    step_rows = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or max(1, round(training.num_epochs * rows / step_rows))
    elements = steps * step_rows * config.data.max_length * vocab_size
    settled = {
        "chunk_size": automatic_chunk_size(vocab_size, head_width, device),
        "compiled": elements >= _COMPILE_FROM_ELEMENTS,
    }
    given = config.loss.model_dump(exclude_none=True)
    return config.model_copy(update={"loss": LossConfig(**{**settled, **given})})


def _replace_callbacks(trainer: DistillTrainer, *callbacks: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    for callback in callbacks:
        trainer.add_callback(callback)
    # Ahead of trackers, which would not see what these add to a line of the log.
    trainer.callback_handler.callbacks.sort(key=lambda callback: callback not in callbacks)


def _before(trainer: DistillTrainer, folder: Path, resume: bool, world: World) -> dict[str, Any]:
    """The measures before training; a resumed run keeps those of its first start."""
    path = folder / runs.CHECKPOINTS / "before.json"
    if resume and path.is_file():
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if trainer.session is not None:
            trainer.session.evaluated(before["eval_ce"])
        return before
    from kdrun.evaluation.measures import held_out_measures

    before = held_out_measures(trainer)
    if world.is_main:
        path.parent.mkdir(exist_ok=True)
        runs.write_json(path, before)
    return before


def _train(trainer: DistillTrainer, checkpoint: Path | None, folder: Path) -> None:
    from kdrun.trainer import StopOnRequest

    stop = StopOnRequest()
    trainer.add_callback(stop)

    def request(signum: int, frame: Any) -> None:
        if stop.requested:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        stop.requested = True

    with _handler(signal.SIGINT, request):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.requested:
        raise Interrupted(
            f"interrupted and saved at step {trainer.state.global_step}; continue with "
            f"--resume --output {folder}"
        )


@contextmanager
def _handler(signum: int, function: Any) -> Iterator[None]:
    try:
        previous = signal.signal(signum, function)
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signum, previous)


def _with_adapters(student: Any, pair: Pair, config: RunConfig, folder: Path, world: World) -> Any:
    """The student with adapters, whose base model is on disk under the name they keep."""
    base = str(pair.student)
    if pair.fresh_student:  # nothing else has these weights, and an adapter is of no use alone
        base = str((folder / runs.BASE).resolve())
        if world.is_main:
            student.save_pretrained(base)
            pair.tokenizer.save_pretrained(base)
    elif pair.student.is_local:
        base = str(Path(base).resolve())
    return add_adapters(student, config.lora, base, config.training.seed)


def _save_student(trainer: DistillTrainer, folder: Path, merge: bool) -> None:
    from kdrun.models.heads import uninstall
    from kdrun.models.shard import gather

    model, tokenizer = trainer.model, trainer.processing_class
    weights = {}
    if trainer.is_distributed_loading_by_transformers:
        weights = {"state_dict": gather(model)}
    if not trainer.args.should_save:
        return
    uninstall(model)
    if merge:
        model.save_pretrained(folder / runs.ADAPTER)
        tokenizer.save_pretrained(folder / runs.ADAPTER)
        model = model.merge_and_unload()
    model.save_pretrained(folder / runs.STUDENT, **weights)
    tokenizer.save_pretrained(folder / runs.STUDENT)


def _peak_memory_mib() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() / 2**20)
    divisor = 2**20 if platform.system() == "Darwin" else 2**10
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / divisor)
