"""Settings derived from a configuration once the models and rows are known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.config.sections import LossConfig

if TYPE_CHECKING:
    import torch

    from kdrun.config.sections import OptimizerConfig, RunConfig, TrainingConfig

_COMPILE_FROM_ELEMENTS = 2e8


def training_arguments(
    optimizer: OptimizerConfig, training: TrainingConfig, checkpoints: Path
) -> Any:
    """Return the Trainer's arguments for a configuration.

    Args:
        optimizer: section ``optimizer``.
        training: section ``training``.
        checkpoints: folder of the checkpoints.
    """
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
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
        dataloader_pin_memory=False,
        # Without it, processes on a CPU would silently train independently.
        use_cpu=not torch.accelerator.is_available(),
    )


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
