"""The section of the rows: where they come from, and how they are tokenised."""

from datetime import date
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kdrun.config.base import BUILT_IN, Section

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
RowFormat = Literal[
    "auto", "text", "prompt_response", "alpaca", "messages", "preference", "prompts"
]


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
    teacher_prompt_field: str | None = Field(
        None,
        description="field with the prompt that the teacher reads, text or messages; null lets it "
        "read the student's",
    )
    teacher_context_field: str | None = Field(
        None, description="field with the text of {context} in data.teacher_template"
    )
    teacher_template: str | None = Field(
        None,
        description="text that the teacher reads instead of the question, with {prompt}, {context} "
        "and {answer}",
    )
    teacher_system: str | None = Field(
        None, description="system prompt that the teacher reads instead of the row's"
    )
    teacher_template_arguments: dict[str, Any] | None = Field(
        None,
        description="variables for the chat template in the teacher's prompt; null uses "
        "data.template_arguments",
    )
    teacher_max_length: int | None = Field(
        None,
        ge=2,
        description="maximum number of tokens that the teacher reads of a row; null uses "
        "data.max_length",
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

    @property
    def teacher_length(self) -> int:
        """The maximum number of tokens that the teacher reads of a row."""
        return self.teacher_max_length or self.max_length

    @property
    def teacher_keys(self) -> list[str]:
        """The keys that are set of what the teacher reads."""
        names = (name for name in type(self).model_fields if name.startswith("teacher_"))
        return [f"data.{name}" for name in names if getattr(self, name) is not None]

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

    @field_validator("template_arguments", "teacher_template_arguments")
    @classmethod
    def _check_arguments(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in sorted(_SET_FOR_TEMPLATES & (given or {}).keys()):
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
