"""Sections of a run's configuration about training: optimiser, steps, adapters, answers."""

import re
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from kdrun.config.base import ALL_LINEAR, Measure, Precision, Section
from kdrun.config.trainer_keys import check_value


class OptimizerConfig(Section):
    """The optimiser and its schedule."""

    name: str | None = Field(
        None,
        description="optimiser of transformers, such as adafactor or adamw_8bit; null is its "
        "default, AdamW",
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, on matrices only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's moments")
    max_grad_norm: float = Field(
        1.0, ge=0, description="gradients are clipped to this norm; 0 disables clipping"
    )
    scheduler: str = Field("cosine", description="name of a scheduler in transformers")
    scheduler_kwargs: dict[str, Any] = Field({}, description="further arguments of the scheduler")
    warmup_steps: int = Field(0, ge=0, description="warm-up steps from 0 to the peak learning rate")


class TrainingConfig(Section):
    """Steps, batches, checkpoints and logging."""

    precision: Precision | None = Field(
        None,
        description="type of the matrix products: bf16 and fp16 are mixed precision, with weights "
        "and optimiser in float32; null is bf16 on an accelerator that supports it, else float32",
    )
    max_steps: int | None = Field(None, ge=1, description="optimiser steps; overrides num_epochs")
    num_epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    batch_size: int = Field(8, ge=1, description="rows per micro-batch in each process")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="micro-batches per optimiser step"
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="evaluate every this many steps; null evaluates only before and after training",
    )
    keep_best: Measure | None = Field(
        None,
        description="held-out measure, such as eval_ce; the student is that of its best "
        "evaluation, which is saved whenever it improves; null takes the last step",
    )
    early_stopping: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a gain in keep_best"
    )
    smallest_gain: float = Field(
        0.0, ge=0, description="with early_stopping: a smaller improvement is no gain"
    )
    save_steps: int = Field(250, ge=1, description="write a checkpoint every this many steps")
    save_total_limit: int = Field(2, ge=1, description="number of checkpoints to keep")
    logging_steps: int = Field(
        10, ge=1, description="write a line of metrics.jsonl every this many steps"
    )
    gradient_parts: bool = Field(
        False,
        description="also log the gradient norms of cross-entropy and loss, and their cosine; "
        "each logged step then takes as long as three",
    )
    seed: int = Field(0, ge=0, description="initial weights, order of rows and dropout")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass"
    )
    nan_loss: Literal["stop", "skip"] = Field(
        "stop",
        description="what to do if the loss of a step is NaN or infinite: stop the run, or skip "
        "the step, leaving weights and optimiser unchanged",
    )
    max_skipped_steps: int = Field(
        3,
        ge=1,
        description="the run stops after this many skipped steps in a row, with nan_loss=skip",
    )
    fsdp: bool = Field(
        False, description="shard both models across the processes started by torchrun (FSDP2)"
    )
    deepspeed: str | None = Field(
        None, description="DeepSpeed is not supported and a value is refused; use training.fsdp"
    )
    torch_compile: bool = Field(
        False, description="compile the student's forward and backward passes (torch.compile)"
    )
    report_to: str = Field(
        "none",
        description="experiment tracker: tensorboard, wandb, trackio, mlflow and others; or none",
    )


class TokenWeightConfig(Section):
    """How much each supervised token counts."""

    spec: str | None = Field(
        None,
        description="name of a registered token weight, with its parameters, such as "
        "disagreement:power=0.5; null weights all tokens equally",
    )
    on: Literal["kd", "both"] = Field(
        "kd", description="weight the distillation loss only, or cross-entropy as well"
    )
    normalize: Literal["none", "running"] = Field(
        "none", description="running divides by the mean weight of the steps before"
    )

    @model_validator(mode="after")
    def _need_a_spec(self) -> Self:
        self.require("token_weight", "spec")
        return self


class TrainerConfig(Section):
    """Any other training argument of transformers.

    Attributes are those of ``transformers.TrainingArguments`` that no other section sets.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """Names and values."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in self.arguments.items():
            check_value(name, value)
        return self


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning (``pip install 'kdlosses[lora]'``)."""

    rank: int | None = Field(
        None, ge=1, description="rank of the adapters; null trains all weights"
    )
    alpha: float = Field(16.0, gt=0, description="updates are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the adapters")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="names of the layers that get adapters, such as [q_proj, v_proj]; all-linear "
        "selects every linear layer except the output head",
    )
    dora: bool = Field(
        False, description="use DoRA, which learns the magnitude of the weights separately"
    )
    merge: bool = Field(
        False, description="save the student as a plain model with its adapters merged"
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="store the frozen weights below the adapters in 4 bits (QLoRA; pip install "
        "'kdlosses[lora,quantize]')",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        if isinstance(given, str) and given != ALL_LINEAR:
            return tuple(name.strip() for name in given.split(",") if name.strip())
        return given

    @field_validator("target_modules")
    @classmethod
    def _some_names(cls, names: Any) -> Any:
        if not names:
            raise ValueError("name at least one layer, or all-linear")
        return names

    @model_validator(mode="after")
    def _need_a_rank(self) -> Self:
        if self.rank is None and self.quantization is not None:
            raise ValueError(
                f"lora.quantization={self.quantization} needs lora.rank: weights in 4 bits cannot "
                "be trained, only adapters above them"
            )
        self.require("lora", "rank")
        return self


class EvaluationConfig(Section):
    """Answers of the trained student, in addition to the measures of its distributions."""

    answers: int = Field(
        0,
        ge=0,
        description="number of held-out prompts that the student answers greedily, for scoring",
    )
    max_new_tokens: int = Field(128, ge=1, description="maximum length of an answer")
    batch_size: int = Field(16, ge=1, description="prompts answered per batch")
    answer_pattern: str | None = Field(
        None,
        description="regular expression whose first group is the final answer, for exact match",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("needs a group, in parentheses, around the final answer")
        return pattern
