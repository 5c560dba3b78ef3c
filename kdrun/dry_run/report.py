"""The dry run: checks, counts, and memory by part."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.cache.choose import check_cache
from kdrun.cache.manifest import read_manifest
from kdrun.config.sections import KD_RATIO, RunConfig
from kdrun.data.prepare import examples_in, lengths_of
from kdrun.data.token_store import Tokens
from kdrun.dry_run.devices import Device, find_device
from kdrun.errors import InputError
from kdrun.losses.build import plain_objective
from kdrun.models.cast import cast_weights
from kdrun.models.context import load_model_config
from kdrun.models.self_teacher import is_self
from kdrun.paths import expand_home
from kdrun.quiet import quiet_libraries
from kdrun.run.arguments import settle
from kdrun.run.check import check, procedure_of
from kdrun.run.features import check_features_layers
from kdrun.run.own_teacher import shares_weights
from kdrun.run.precision import autocast_type, notes_on_types, settle_precision
from kdrun.run.prepare import prepare

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from kdrun.data.prepare import Examples
    from kdrun.dry_run.models import ModelSize
    from kdrun.models.pairs import Pair
    from kdrun.procedures.sampling import Sampling

# Values that an optimiser keeps for each trained weight, in its type or in 8 bits, by its name.
_STATES = {"ademamix": 3, "adamw": 2, "lion": 1, "adagrad": 1, "rmsprop": 1}
_NO_STATES = ("sgd", "adafactor")  # adafactor keeps rows and columns only
_OTHER_STATES = ("galore", "apollo", "grokadamw", "adamw_torch_4bit")
_SPREAD = ("weights of the student", "weights of the teacher", "gradients", "optimiser")


@dataclass(frozen=True)
class DryRun:
    """The steps and memory of a run.

    Attributes:
        student: size of the student.
        teacher: size of the teacher; None if no teacher is loaded.
        notes: lines about rows, tokenizers and cache.
        steps: number of optimiser steps.
        processes: number of processes.
        rows_per_step: rows over all micro-batches and processes, including those that a procedure
            adds.
        longest: tokens of the longest training row.
        memory: bytes by part on the device of one process; None if unknown.
        device: the device.
    """

    student: ModelSize
    teacher: ModelSize | None
    notes: tuple[str, ...]
    steps: int
    processes: int
    rows_per_step: int
    longest: int
    memory: dict[str, int | None]
    device: Device
    lora: str | None = field(default=None)

    @property
    def total(self) -> int:
        """Bytes of all known parts."""
        return sum(part or 0 for part in self.memory.values())


def dry_run(
    config: RunConfig, device_name: str | None = None, processes: int | None = None
) -> DryRun:
    """Check the input of a run and estimate its memory, without reading weights or writing files.

    Args:
        config: configuration of the run.
        device_name: device, as in :func:`find_device`.
        processes: number of processes; None for those started by torchrun, or one.

    Raises:
        InputError: as raised by the run itself.
    """
    rows = check(config)
    device = find_device(device_name)
    config = settle_precision(config, None if device_name is None else device.kind)
    procedure, made = procedure_of(config), 1
    processes = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if config.training.fsdp and processes == 1:
        raise InputError(
            "training.fsdp=true shards the models across processes: pass --processes N"
        )
    notes = notes_on_types(config)
    with quiet_libraries():
        prepared = prepare(config, rows, notes.append)
        pair, examples = prepared.pair, prepared.examples
        if config.model.teacher_cache is not None:
            plain = plain_objective(config.loss, config.token_weight)
            notes.append(
                f"teacher: {check_cache(config.model, config.loss, pair, examples, plain)}"
            )
        count = len(examples.train)  # type: ignore[arg-type]
        most = int(lengths_of(examples.train).max())
        if procedure is not None and prepared.sampling is not None:
            from kdrun.procedures.sampling import longest_written

            made = procedure.cost(config).rows
            most = max(most, longest_written(examples_in(examples.train), prepared.sampling))
        batch = made * min(config.training.batch_size, count)
        student, teacher, memory = _memory(
            config, pair, most, count, batch, device, _longest_seen(examples, prepared.sampling)
        )
        place = _where(config, device)
        if teacher is not None and place is not None:
            notes.append(
                f"teacher: {_gib(teacher.weights)} on {place}; the student's device keeps a copy "
                "of its head"
            )
        if processes > 1:
            gathered = 0
            if config.training.fsdp:
                gathered = _gathered(student, teacher, autocast_type(config))
            memory = _on_one_of(processes, gathered, memory)
    return DryRun(
        student=student,
        teacher=teacher,
        notes=tuple(notes),
        steps=_steps(config, count, processes),
        processes=processes,
        rows_per_step=processes
        * made
        * config.training.batch_size
        * config.training.gradient_accumulation_steps,
        longest=most,
        memory=memory,
        device=device,
        lora=_adapters(config),
    )


def _longest_seen(examples: Examples, sampling: Sampling | None) -> int:
    """Return the tokens of the longest row that the teacher alone reads; 0 without such rows."""
    rows: Any = examples.train
    if isinstance(rows, Tokens):
        longest = int(rows.teacher_lengths().max()) if rows.has_view() else 0
    else:
        name = "teacher_input_ids"
        seen = (len(row[name]) for row in examples_in(rows) if name in row)
        longest = max(seen, default=0)
    if not longest or sampling is None:
        return longest
    return min(longest + sampling.max_new_tokens, sampling.teacher_max_length or longest)


def _adapters(config: RunConfig) -> str | None:
    kind = "DoRA" if config.lora.dora else "LoRA"
    stored = config.lora.quantization
    above = "" if stored is None else f" above {stored}"
    return None if config.lora.rank is None else f"{kind} of rank {config.lora.rank}{above}"


def _steps(config: RunConfig, rows: int, processes: int) -> int:
    """The number of optimiser steps, as counted by the Trainer."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    batches = math.ceil(rows / (training.batch_size * processes))
    per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    return math.ceil(training.num_epochs * per_epoch)


def _memory(
    config: RunConfig,
    pair: Pair,
    longest: int,
    rows: int,
    batch: int,
    device: Device,
    most_seen: int = 0,
) -> tuple[ModelSize, ModelSize | None, dict[str, int | None]]:
    import torch

    from kdrun.dry_run.loss_memory import loss_bytes
    from kdrun.dry_run.models import Shadow

    model, trust = config.model, config.model.trust_remote_code
    shape = load_model_config(pair.student, trust)
    shadow = Shadow(pair.student, shape, model.student_type, trust, pair, config.lora.quantization)
    if config.lora.rank is not None:
        shadow.adapt(config)
    student = shadow.size()
    teacher, teacher_weights, width = None, 0, 0
    if is_self(model.teacher):
        width = student.head[1]
        if not shares_weights(config):
            kind = model.teacher_type if model.teacher_ema is None else model.student_type
            teacher = Shadow(pair.student, shape, kind, trust, pair).size()
            teacher_weights = _beside_student(config, teacher, device)
    if pair.teacher is not None:
        shape = load_model_config(pair.teacher, trust)
        stored = model.teacher_quantization
        teacher = Shadow(pair.teacher, shape, model.teacher_type, trust, pair, stored).size()
        teacher_weights, width = _beside_student(config, teacher, device), teacher.head[1]
    if config.model.teacher_cache is not None:
        manifest = read_manifest(expand_home(config.model.teacher_cache))
        teacher_weights += 0 if manifest.head is None else manifest.head.bytes
        width = manifest.entries
    tokens, seen = batch * longest, batch * most_seen
    kept = 0  # teacher values for the loss: its last hidden states, or cached entries
    if config.loss.kd_ratio > 0 or KD_RATIO in config.loss.schedules:
        kept = (tokens + seen) * width * getattr(torch, model.teacher_type).itemsize
    checkpointing, autocast = config.training.gradient_checkpointing, autocast_type(config)
    if config.training.fsdp and autocast is not None:  # gathered in this type, without copies
        cast_weights(shadow.model, autocast)
        activations = shadow.activations(batch, longest, checkpointing)
    else:
        activations = shadow.activations(batch, longest, checkpointing, autocast)
    item_size = student.item_size if autocast is None else autocast.itemsize
    settled = settle(config, pair.vocab_size, student.head[1], torch.device(device.kind), rows)
    copies = 0 if autocast is None or config.training.fsdp else shadow.copies(autocast)
    memory = {
        "weights of the student": student.weights,
        **({"16-bit copies of them": copies} if copies else {}),
        "weights of the teacher": teacher_weights,
        "gradients": student.trained_weights,
        "optimiser": _optimizer_bytes(config.optimizer.name, student),
        "activations": None if activations is None else activations + kept,
        "loss": loss_bytes(settled.loss, pair.vocab_size, student, item_size, tokens, device.kind),
        **_features(config, pair, batch, longest, item_size),
    }
    return student, teacher, memory


def _features(
    config: RunConfig, pair: Pair, rows: int, length: int, item_size: int
) -> dict[str, int | None]:
    """The part of a term on hidden states, if there is one."""
    from kdrun.dry_run.features import feature_bytes
    from kdrun.models.hidden import hidden_shape

    plan = check_features_layers(config, pair.teacher, pair.student)
    if plan is None or pair.teacher is None:
        return {}
    trust = config.model.trust_remote_code
    teacher, student = (
        hidden_shape(load_model_config(model, trust)) for model in (pair.teacher, pair.student)
    )
    size = feature_bytes(plan, config, teacher, student, rows, length, item_size)
    return {"features": size}


def _optimizer_bytes(name: str | None, student: ModelSize) -> int | None:
    """Bytes of the optimiser's state; None if they are unknown, as of low-rank projections."""
    name = name or "adamw"
    if name.startswith(_NO_STATES):
        return 0
    states = next((count for part, count in _STATES.items() if part in name), None)
    if states is None or name.startswith(_OTHER_STATES):
        return None
    return states * (student.trained if name.endswith("8bit") else student.trained_weights)


def _beside_student(config: RunConfig, teacher: ModelSize, device: Device) -> int:
    """The bytes of a teacher on the student's device."""
    if _where(config, device) is None:
        return teacher.weights
    rows, width = teacher.head
    return rows * width * teacher.item_size  # losses read a copy of its head there


def _where(config: RunConfig, device: Device) -> str | None:
    """The place of a teacher that is not on the student's device."""
    given = config.model.teacher_device
    if given == "auto":
        return "other devices"
    return "the CPU" if given is not None and device.kind != given else None


def _on_one_of(
    processes: int, gathered: int, memory: dict[str, int | None]
) -> dict[str, int | None]:
    """The memory of one of several processes.

    DDP keeps a full copy on each process, and a second copy of the gradients in the communication
    buckets. FSDP2 keeps a share of weights, gradients and optimiser, plus the gathered parameters.

    Args:
        processes: their number.
        gathered: bytes of gathered parameters; 0 without FSDP2.
        memory: bytes by part, of a single process.
    """
    if not gathered:
        return {**memory, "gradients": 2 * (memory["gradients"] or 0)}
    shared = {
        name: math.ceil(part / processes)
        for name, part in memory.items()
        if part is not None and name in _SPREAD
    }
    return {**memory, **shared, "gathered weights": gathered}


def _gathered(
    student: ModelSize, teacher: ModelSize | None, computed_in: torch.dtype | None
) -> int:
    """Bytes outside the blocks of each model, of the current block and of the next one."""
    smaller = 1.0 if computed_in is None else computed_in.itemsize / student.item_size
    parts = [(student.outside_blocks * smaller, student.largest_block * smaller)]
    if teacher is not None:
        parts.append((teacher.outside_blocks, teacher.largest_block))
    return int(sum(outside for outside, _ in parts) + 2 * max(block for _, block in parts))


def show(found: DryRun, console: Console) -> None:
    """Print the result of a dry run."""
    for note in found.notes:
        console.print(note, markup=False)
    adapters = "" if found.lora is None else f" ({found.lora})"
    for name, size in (("teacher", found.teacher), ("student", found.student)):
        if size is not None:
            console.print(f"{name}: {size.kind}, {size.parameters / 1e6:.2f} M parameters")
    console.print(f"trained: {found.student.trained / 1e6:.2f} M parameters{adapters}")
    console.print(
        f"steps: {found.steps} of {found.rows_per_step} rows, up to "
        f"{found.rows_per_step * found.longest} tokens each"
    )
    each = "" if found.processes == 1 else f" for each of {found.processes} processes"
    console.print(f"memory on {found.device.name}{each}, about:")
    for name, part in found.memory.items():
        console.print(f"  {name:<24}{_gib(part):>12}")
    free = found.device.memory
    fits = "" if free is None else f" of {_gib(free)}"
    console.print(f"  {'total':<24}{_gib(found.total):>12}{fits}")
    if free is not None and found.total > free:
        console.print(
            "this does not fit: lower --batch-size (and raise "
            "training.gradient_accumulation_steps), set training.gradient_checkpointing=true, "
            "or use --lora-rank"
        )


def _gib(size: int | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
