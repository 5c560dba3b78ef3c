"""The sections of a run's configuration: every key with its type, bounds, default and meaning."""

import re
from datetime import date
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kdlosses import Schedule

BUILT_IN = "builtin"
KD_RATIO = "kd_ratio"
ALL_LINEAR = "all-linear"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(_Section):
    """Which models."""

    teacher: str | None = Field(
        None, description="folder, hub id or GGUF file; 'builtin'; null trains without a teacher"
    )
    teacher_cache: str | None = Field(
        None, description="folder that 'kdrun cache-teacher' wrote; takes the teacher's place"
    )
    teacher_quantization: Literal["int8"] | None = Field(
        None,
        description="store the weights of the teacher's layers in 8 bits (pip install "
        "'kdlosses[quantize]'); null keeps model.dtype",
    )
    student: str = Field(BUILT_IN, description="folder or hub id; 'builtin'")
    init_seed: int | None = Field(
        None, ge=0, description="seed of a student without weights; null takes training.seed"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of both models' weights"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with a model, for both models"
    )


class DataConfig(_Section):
    """Which rows, and how they become tokens."""

    train: str = Field(BUILT_IN, description="file or hub id; 'builtin'")
    eval: str | None = Field(
        None, description="held-out rows; by default 5 % of the training rows, by content hash"
    )
    test: str | None = Field(
        None, description="rows that comparisons report on in the place of the held-out ones"
    )
    part: Literal["all", "validation", "test"] = Field(
        "all",
        description="which held-out rows to measure on; without data.test they are halved by "
        "content hash",
    )
    hold_out: Literal["prompt", "content"] = Field(
        "prompt",
        description="without data.eval: keep rows that ask the same, or only equal rows, on one "
        "side",
    )
    format: Literal["auto", "text", "prompt_response", "alpaca", "messages"] = Field(
        "auto", description="how a row is read"
    )
    prompt_field: str | None = Field(None, description="field of the prompt")
    response_field: str | None = Field(None, description="field of the answer")
    rendered: bool = Field(
        False,
        description="prompts and answers are rendered already: join them as they are, without the "
        "chat template",
    )
    date: str | None = Field(
        None,
        description="the day, as 2026-01-31, that chat templates write which write one; null takes "
        "today's, and the run keeps it",
    )
    max_length: int = Field(512, ge=2, description="tokens a row")
    long_rows: Literal["cut", "skip"] = Field(
        "cut", description="what becomes of conversations with more tokens; both are counted"
    )
    packing: bool = Field(
        False,
        description="put several conversations into one training row of max_length tokens; they "
        "do not see each other",
    )
    cache_dir: str | None = Field(
        None,
        description="folder where tokenised rows are kept for the next run; 'none' keeps nothing, "
        "null takes kdrun/tokens in the user's cache folder",
    )
    shift_windows: bool = Field(
        True,
        description="cut plain text into windows at other places in each epoch; false cuts it "
        "once, which a teacher cache needs",
    )
    strict: bool = Field(
        False,
        description="refuse rows that are unusable, or that the chat template does not write whole",
    )
    accept_changes: bool = Field(
        False,
        description="resume although rows, tokenizer or models are not those that the run began "
        "with; the summary says so",
    )

    @field_validator("date")
    @classmethod
    def _check_date(cls, given: str | None) -> str | None:
        if given is not None:
            try:
                date.fromisoformat(given)
            except ValueError as error:
                raise ValueError("not a day such as 2026-01-31") from error
        return given

    @field_validator("date", mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> Any:
        return given.isoformat() if isinstance(given, date) else given  # as YAML reads it


class LossConfig(_Section):
    """The objective."""

    spec: str = Field("forward_kl_chunked", description="a registered loss and its parameters")
    kd_ratio: float = Field(
        0.5, ge=0, le=1, description="weight of the distillation loss; the rest is cross-entropy"
    )
    temperature: float = Field(1.0, gt=0, description="softens both sides of the loss")
    temperature_scaling: bool = Field(
        True, description="multiply by temperature ** temperature_power"
    )
    match_curvature: bool = Field(
        False, description="divide by the loss's curvature: as strong as KL near equality"
    )
    schedules: dict[str, Schedule] = Field(
        {},
        description="how kd_ratio, temperature or a parameter of the loss moves in training; "
        "takes the place of the fixed value",
    )
    chunk_size: int | None = Field(
        None, ge=1, description="tokens a chunk; null chooses by vocabulary and width"
    )
    compiled: bool | None = Field(
        None, description="compile the loss; null decides by the length of the run"
    )

    @field_validator("schedules")
    @classmethod
    def _check_ratio(cls, schedules: dict[str, Schedule]) -> dict[str, Schedule]:
        if KD_RATIO in schedules and any(not 0 <= x <= 1 for x in schedules[KD_RATIO].extremes):
            raise ValueError("kd_ratio must stay within [0, 1]")
        return schedules


class OptimizerConfig(_Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-4, gt=0, description="highest learning rate")
    weight_decay: float = Field(0.0, ge=0, description="on matrices only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decays")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 clips nothing")
    scheduler: str = Field("cosine", description="a scheduler of transformers")
    scheduler_kwargs: dict[str, Any] = Field({}, description="its further arguments")
    warmup_steps: int = Field(0, ge=0, description="steps from 0 to the highest rate")


class TrainingConfig(_Section):
    """Steps, batches, and what is written when."""

    max_steps: int | None = Field(None, ge=1, description="optimiser steps; wins over num_epochs")
    num_epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    batch_size: int = Field(8, ge=1, description="rows per process and micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches a step")
    eval_steps: int | None = Field(None, ge=1, description="evaluate every so many steps")
    save_steps: int = Field(250, ge=1, description="write a checkpoint every so many steps")
    save_total_limit: int = Field(2, ge=1, description="checkpoints that are kept")
    logging_steps: int = Field(10, ge=1, description="steps a line of metrics.jsonl")
    gradient_parts: bool = Field(
        False,
        description="also log the norms of the gradients of cross-entropy and loss, and their "
        "cosine; a step with a line then takes the time of three",
    )
    seed: int = Field(0, ge=0, description="initial weights, order of rows and dropout")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward")
    nan_loss: Literal["stop", "skip"] = Field(
        "stop",
        description="a step whose loss is NaN or infinite: stop the run, or leave the step out, "
        "with weights and optimiser as they were",
    )
    max_skipped_steps: int = Field(
        3, ge=1, description="steps in a row that nan_loss=skip leaves out before the run stops"
    )
    fsdp: bool = Field(
        False, description="spread both models over the processes that torchrun started (FSDP2)"
    )
    deepspeed: str | None = Field(
        None, description="JSON file of DeepSpeed; refused, training.fsdp takes its place"
    )
    torch_compile: bool = Field(
        False, description="compile the student's forward and backward pass (torch.compile)"
    )
    report_to: str = Field(
        "none", description="a tracker: tensorboard, wandb, trackio, mlflow and others; or none"
    )


class EvaluationConfig(_Section):
    """What the trained student is asked, beside the measures of its distributions."""

    answers: int = Field(
        0, ge=0, description="held-out prompts it answers greedily and is scored on"
    )
    max_new_tokens: int = Field(128, ge=1, description="where an answer is cut")
    batch_size: int = Field(16, ge=1, description="prompts that are answered at once")
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


class LoraConfig(_Section):
    """Low-rank adapters in place of full fine-tuning (``pip install 'kdlosses[lora]'``)."""

    rank: int | None = Field(
        None, ge=1, description="rank of the adapters; null trains all weights"
    )
    alpha: float = Field(16.0, gt=0, description="adapters are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of adapters")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="names of the layers that get adapters, such as [q_proj, v_proj]; all-linear "
        "takes every linear layer but the output head",
    )
    dora: bool = Field(False, description="DoRA: learn the length of weight rows apart")
    merge: bool = Field(
        False, description="also save the student with its adapters merged, as a plain folder"
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
        if self.rank is None and self.model_fields_set - {"rank"}:
            changed = [
                name
                for name, field in type(self).model_fields.items()
                if getattr(self, name) != field.default
            ]
            if changed:
                raise ValueError(f"lora.{changed[0]} has no effect without lora.rank")
        return self


class ProcedureConfig(_Section):
    """Which text is learned from, and how answers are sampled."""

    spec: str | None = Field(
        None,
        description="a registered procedure and its parameters, such as gkd:lambda=0.5; null "
        "learns from the data",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="where an answer is cut; null takes half of data.max_length"
    )
    sampling_temperature: float = Field(
        1.0, ge=0, description="of the sampling alone; 0 takes the most likely token"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens of this mass; 1 from all"
    )
    top_k: int = Field(0, ge=0, description="sample from so many likely tokens; 0 from all")
    batch_size: int = Field(16, ge=1, description="prompts that are answered at once")
    text: str | None = Field(
        None,
        description="plain text of minillm's cross-entropy, a file or hub id; null takes the "
        "training rows",
    )

    @model_validator(mode="after")
    def _need_a_spec(self) -> Self:
        if self.spec is None:
            for name, field in type(self).model_fields.items():
                if getattr(self, name) != field.default:
                    raise ValueError(f"procedure.{name} has no effect without procedure.spec")
        return self


class OutputConfig(_Section):
    """Where the run goes."""

    dir: str | None = Field(None, description="the run's folder; null: runs/<time>-<loss>")


class RunConfig(_Section):
    """The configuration of one run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    procedure: ProcedureConfig = ProcedureConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    lora: LoraConfig = LoraConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    def to_yaml(self) -> str:
        """The resolved configuration; ``kdrun --config`` takes it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
