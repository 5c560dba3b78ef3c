"""Settings derived from a configuration once the models and rows are known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kdrun.config.sections import LossConfig
from kdrun.errors import InputError

if TYPE_CHECKING:
    import torch

    from kdrun.config.sections import RunConfig
    from kdrun.config.training_sections import OptimizerConfig, TrainingConfig

_COMPILE_FROM_ELEMENTS = 2e8


def training_arguments(
    optimizer: OptimizerConfig,
    training: TrainingConfig,
    checkpoints: Path,
    further: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Return the Trainer's arguments for a configuration.

    Args:
        optimizer: section ``optimizer``.
        training: section ``training``.
        checkpoints: folder of the checkpoints.
        further: section ``trainer``.

    Raises:
        InputError: the installed packages cannot do what ``further`` asks for.
    """
    import torch
    from transformers import TrainingArguments

    accelerated = torch.accelerator.is_available()
    given: dict[str, Any] = dict(
        output_dir=str(checkpoints),
        max_steps=training.max_steps or -1,
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        activation_checkpointing=training.gradient_checkpointing,
        torch_compile=training.torch_compile,
        # Sharded models have a policy of their own; see shard.py.
        bf16=training.precision == "bf16" and not training.fsdp,
        fp16=training.precision == "fp16",
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
        # The Trainer requires this for sharded models; see build.py.
        save_only_model=training.fsdp,
        seed=training.seed,
        data_seed=training.seed,
        report_to=training.report_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=accelerated,
        # Without it, processes on a CPU would silently train independently.
        use_cpu=not accelerated,
        # Each process reads a stream itself: batches of unequal length cannot be sent joined.
        accelerator_config={"dispatch_batches": False},
        # The student is uploaded when it is finished; see publish.py.
        hub_strategy="end",
        **({} if optimizer.name is None else {"optim": optimizer.name}),
    )
    try:
        return TrainingArguments(**given | dict(further))
    except (ValueError, ImportError) as error:
        if not further:
            raise
        reason = " ".join(str(error).split())
        raise InputError(f"trainer: transformers refuses {dict(further)} ({reason})") from error


_BETAS_UNUSED = ("sgd", "adafactor", "adagrad", "rmsprop")
_PACKAGES = {  # by a part of the optimiser's name; the first that fits
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "xla": ("torch_xla", "torch_xla"),
    "npu": ("torch_npu", "torch_npu"),
    **dict.fromkeys(("bnb", "8bit", "paged", "lion", "ademamix"), ("bitsandbytes", "bitsandbytes")),
}


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Refuse an optimiser that transformers does not have, or whose package is missing.

    Raises:
        InputError: gives a similar name, or the command that installs the package.
    """
    name = optimizer.name
    if name is None:
        return
    from transformers.training_args import OptimizerNames

    known = [str(one.value) for one in OptimizerNames]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise InputError(f"optimizer.name={name!r}: transformers has no such optimiser; {hint}")
    needed = next((package for part, package in _PACKAGES.items() if part in name), None)
    if needed is not None and find_spec(needed[0]) is None:
        raise InputError(f"optimizer.name={name} needs a package: pip install {needed[1]}")
    default = type(optimizer).model_fields["betas"].default
    if name.startswith(_BETAS_UNUSED) and optimizer.betas != default:
        raise InputError(f"optimizer.betas has no effect with optimizer.name={name}; remove it")


def settle(
    config: RunConfig, vocab_size: int, head_width: int, device: torch.device, rows: int
) -> RunConfig:
    """Record automatic choices, so that a resumed or repeated run rounds identically.

    Args:
        config: configuration of the run.
        vocab_size: number of tokens that both models share.
        head_width: width of the student's hidden states.
        device: device on which the student is trained.
        rows: number of training rows.
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
