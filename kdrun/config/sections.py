"""The sections of a run's configuration: every key with its type, bounds, default and meaning."""

from typing import Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from kdlosses import Schedule
from kdrun.config.base import BUILT_IN, DType, Section
from kdrun.config.data_section import DataConfig
from kdrun.config.features_section import FeaturesConfig
from kdrun.config.served_section import ServedConfig
from kdrun.config.training_sections import (
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    TokenWeightConfig,
    TrainerConfig,
    TrainingConfig,
)

KD_RATIO = "kd_ratio"
SHORT_NAMES = {"model.dtype": ("model.student_dtype", "model.teacher_dtype")}
"""Keys that set several others, where those are not set themselves."""


class ModelConfig(Section):
    """The models."""

    teacher: str | None = Field(
        None,
        description="folder, hub id, GGUF file or address of a server (section served); 'builtin'; "
        "'self' is the student at its start, 'self:live' its present weights; null trains without "
        "a teacher",
    )
    teacher_ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="with teacher=self: the teacher is the running mean of the student's weights, "
        "of which each step keeps this share, such as 0.999",
    )
    teacher_cache: str | None = Field(
        None, description="folder written by 'kdrun cache-teacher'; used instead of the teacher"
    )
    teacher_quantization: Literal["int8", "nf4"] | None = Field(
        None,
        description="store the weights of the teacher's layers in 8 bits (int8) or 4 bits (nf4) "
        "(pip install 'kdlosses[quantize]'); null keeps model.teacher_dtype",
    )
    student: str = Field(BUILT_IN, description="folder or hub id; 'builtin'")
    init_seed: int | None = Field(
        None, ge=0, description="seed for a student without weights; null uses training.seed"
    )
    student_dtype: DType | None = Field(
        None,
        description="data type of the student's weights; null is float32, or below adapters the "
        "type of training.precision. The short name model.dtype sets this and teacher_dtype",
    )
    teacher_dtype: DType | None = Field(
        None,
        description="data type of the teacher's weights; null is the type of training.precision",
    )
    trust_remote_code: bool = Field(
        False, description="run the Python code that comes with a model, for both models"
    )
    attention: str | None = Field(
        None,
        description="implementation of attention in both models: sdpa, eager, flash_attention_2, "
        "flex_attention or another that transformers knows; null lets transformers choose",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a student on the hub; null uses main"
    )
    teacher_revision: str | None = Field(
        None, description="branch, tag or commit of a teacher on the hub; null uses main"
    )
    teacher_device: Literal["auto", "cpu"] | None = Field(
        None,
        description="where the teacher runs: cpu, or auto to spread it over the devices that no "
        "student uses; null uses the student's device",
    )

    @property
    def student_type(self) -> DType:
        """The type of the student's weights; float32 if the run has chosen none."""
        return self.student_dtype or "float32"

    @property
    def teacher_type(self) -> DType:
        """The type of the teacher's weights; float32 if the run has chosen none."""
        return self.teacher_dtype or "float32"


class LossConfig(Section):
    """The objective."""

    spec: str = Field(
        "forward_kl_chunked", description="name of a registered loss, with its parameters"
    )
    kd_ratio: float = Field(
        0.5, ge=0, le=1, description="weight of the distillation loss; the rest is cross-entropy"
    )
    temperature: float = Field(1.0, gt=0, description="softens both distributions")
    temperature_scaling: bool = Field(
        True, description="multiply the loss by temperature ** temperature_power"
    )
    match_curvature: bool = Field(
        False,
        description="divide the loss by its curvature, so that it is as strong as KL near equality",
    )
    schedules: dict[str, Schedule] = Field(
        {},
        description="how kd_ratio, temperature or a parameter of the loss changes during training; "
        "replaces the fixed value",
    )
    chunk_size: int | None = Field(
        None, ge=1, description="tokens per chunk; null chooses by vocabulary size and width"
    )
    compiled: bool | None = Field(
        None, description="compile the loss; null decides by the number of steps"
    )

    @field_validator("schedules")
    @classmethod
    def _check_ratio(cls, schedules: dict[str, Schedule]) -> dict[str, Schedule]:
        if KD_RATIO in schedules and any(not 0 <= x <= 1 for x in schedules[KD_RATIO].extremes):
            raise ValueError("kd_ratio must stay within [0, 1]")
        return schedules


class ProcedureConfig(Section):
    """The source of the training text, and how answers are sampled."""

    spec: str | None = Field(
        None,
        description="name of a registered procedure, with its parameters, such as "
        "gkd:lambda=0.5; null trains on the data",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="maximum length of an answer; null is half of data.max_length"
    )
    sampling_temperature: float = Field(
        1.0, ge=0, description="temperature of the sampling only; 0 selects the most likely token"
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="sample from the most likely tokens with this total probability; 1 uses all",
    )
    top_k: int = Field(0, ge=0, description="sample from this many most likely tokens; 0 uses all")
    batch_size: int = Field(16, ge=1, description="prompts answered per batch")
    text: str | None = Field(
        None,
        description="plain text for the cross-entropy of minillm, a file or hub id; null uses the "
        "training rows",
    )

    teacher_writer: str | None = Field(
        None,
        description="address of a server that writes the teacher's answers; null takes the "
        "teacher, which may itself be on a server",
    )
    writer: str | None = Field(
        None,
        description="address of a server that writes the student's answers, with weights that it "
        "takes in; null lets the run write them",
    )
    sync_steps: int = Field(
        1, ge=1, description="with writer: steps after which it takes in the student's weights"
    )
    sync_folder: str | None = Field(
        None,
        description="with writer: folder for these weights, which both see; null is in the run's "
        "folder",
    )

    @model_validator(mode="after")
    def _need_a_spec(self) -> Self:
        self.require("procedure", "spec")
        if self.writer is None and (self.sync_steps != 1 or self.sync_folder is not None):
            key = "sync_steps" if self.sync_steps != 1 else "sync_folder"
            raise ValueError(f"procedure.{key} has no effect without procedure.writer")
        for key in ("writer", "teacher_writer"):
            given = getattr(self, key)
            if given is not None and not given.startswith(("http://", "https://")):
                raise ValueError(f"procedure.{key}: not an address; write http://HOST:PORT")
        return self


class OutputConfig(Section):
    """The output folder."""

    dir: str | None = Field(None, description="the run folder; null uses runs/<time>-<loss>")
    dtype: DType | None = Field(
        None,
        description="data type of the saved student, not of adapters; null is the type of "
        "training.precision",
    )


class RunConfig(Section):
    """The configuration of one run."""

    model: ModelConfig = ModelConfig()
    served: ServedConfig = ServedConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    token_weight: TokenWeightConfig = TokenWeightConfig()
    features: FeaturesConfig = FeaturesConfig()
    procedure: ProcedureConfig = ProcedureConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    trainer: TrainerConfig = TrainerConfig()
    lora: LoraConfig = LoraConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    def to_yaml(self) -> str:
        """The resolved configuration, as YAML that ``kdrun --config`` accepts."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
