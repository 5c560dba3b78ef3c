"""The sections of a run's configuration: every key with its type, bounds, default and meaning."""

from datetime import date
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from kdlosses import Schedule
from kdrun.config.base import DType, Section
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

BUILT_IN = "builtin"
KD_RATIO = "kd_ratio"
_SET_FOR_TEMPLATES = frozenset(
    {
        "self",
        "messages",
        "conversation",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
"""Arguments of transformers' ``apply_chat_template`` that are no variables of a user's template."""
SHORT_NAMES = {"model.dtype": ("model.student_dtype", "model.teacher_dtype")}
"""Keys that set several others, where those are not set themselves."""
RowFormat = Literal[
    "auto", "text", "prompt_response", "alpaca", "messages", "preference", "prompts"
]


class ModelConfig(Section):
    """The models."""

    teacher: str | None = Field(
        None,
        description="folder, hub id, GGUF file or address of a server (section served); 'builtin'; "
        "null trains without a teacher",
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


class SourceConfig(Section):
    """One of several sources of training rows.

    Attributes:
        path: as data.train.
        weight: share of the training rows, relative to that of the others; None takes every row
            once.
        format: as data.format.
        prompt_field: as data.prompt_field.
        response_field: as data.response_field.
    """

    path: str
    weight: float | None = Field(None, gt=0)
    format: RowFormat = "auto"
    prompt_field: str | None = None
    response_field: str | None = None


Sources = str | tuple[str, ...]
"""One or several files, globs, folders or hub ids."""


class DataConfig(Section):
    """The rows, and how they are tokenised."""

    train: Sources = Field(
        BUILT_IN,
        description="file, glob, folder or hub id (owner/name:configuration@split), or a list of "
        "them; 'builtin'",
    )
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="instead of train: sources with path, and optionally weight, format, "
        "prompt_field and response_field of their own; with weights they are mixed",
    )
    eval: Sources | None = Field(
        None,
        description="held-out rows; by default 5 % of the training rows, chosen by content hash",
    )
    test: str | None = Field(
        None, description="rows that comparisons report on instead of the held-out rows"
    )
    part: Literal["all", "validation", "test"] = Field(
        "all",
        description="which held-out rows to evaluate on; without data.test they are split in "
        "half by content hash",
    )
    streaming: bool = Field(
        False,
        description="read training rows while training, in the order of the source and through a "
        "shuffle buffer; needs data.eval and training.max_steps",
    )
    shuffle_buffer: int = Field(
        10_000, ge=1, description="rows from which streaming draws the next one; 1 keeps the order"
    )
    hold_out: Literal["prompt", "content"] = Field(
        "prompt",
        description="without data.eval: whether rows with the same prompt, or only identical "
        "rows, stay on one side of the split",
    )
    format: RowFormat = Field(
        "auto", description="format of the rows; auto detects it from the field names"
    )
    prompt_field: str | None = Field(None, description="name of the prompt field")
    response_field: str | None = Field(None, description="name of the answer field")
    template: str | None = Field(
        None,
        description="file with a chat template (Jinja) to use instead of the tokenizer's; it is "
        "saved with the student",
    )
    template_arguments: dict[str, Any] = Field(
        {}, description="variables for the chat template, such as {enable_thinking: false}"
    )
    reasoning: Literal["keep", "drop"] = Field(
        "keep",
        description="whether the reasoning of answers (reasoning_content, or <think> in their "
        "text) is learned, as far as the template writes it, or left out",
    )
    supervise: Literal["all", "last"] = Field(
        "all", description="which answers of a conversation are learned"
    )
    rendered: bool = Field(
        False,
        description="prompts and answers are already rendered: concatenate them without the "
        "chat template",
    )
    date: str | None = Field(
        None,
        description="date, such as 2026-01-31, for chat templates that include one; null uses "
        "today's date, which the run keeps",
    )
    max_length: int = Field(512, ge=2, description="maximum number of tokens in a row")
    long_rows: Literal["cut", "skip"] = Field(
        "cut", description="what to do with longer conversations; both cases are counted"
    )
    packing: bool = Field(
        False,
        description="pack several conversations into one training row of max_length tokens; "
        "each attends only to itself",
    )
    cache_dir: str | None = Field(
        None,
        description="folder that keeps tokenised rows for the next run; 'none' disables it, null "
        "uses kdrun/tokens in the user's cache folder",
    )
    workers: int | None = Field(
        None, ge=1, description="processes that tokenise rows; null is one for each core"
    )
    shift_windows: bool = Field(
        True,
        description="cut plain text into windows at different places in each epoch; false cuts it "
        "once, as a teacher cache requires",
    )
    strict: bool = Field(
        False,
        description="refuse rows that are unusable, or that the chat template does not write whole",
    )
    accept_changes: bool = Field(
        False,
        description="resume even if rows, tokenizer or models differ from those at the start of "
        "the run; the summary records it",
    )

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        weights = [source.weight is not None for source in self.sources]
        if self.sources and self.train != BUILT_IN:
            raise ValueError(
                "data.train and data.sources are both set; put all rows in one of them"
            )
        if any(weights) and not all(weights):
            raise ValueError("data.sources: give all sources a weight, or none")
        if self.streaming and self.eval is None:
            raise ValueError("data.streaming=true holds out no rows; pass them with --eval-data")
        if self.streaming and self.train == BUILT_IN and not self.sources:
            raise ValueError("data.streaming=true: the built-in text is not streamed; pass --data")
        if self.streaming and (self.packing or any(weights)):
            raise ValueError(
                "data.streaming=true excludes data.packing and weights of data.sources; remove them"
            )
        if any(weights) and self.packing:
            raise ValueError("data.packing is not supported for sources that are mixed by weights")
        return self

    @field_validator("template_arguments")
    @classmethod
    def _check_arguments(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(_SET_FOR_TEMPLATES & given.keys()):
            raise ValueError(f"{name} is set for every row; remove it")
        return given

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
        return given.isoformat() if isinstance(given, date) else given  # YAML parses a date itself


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
