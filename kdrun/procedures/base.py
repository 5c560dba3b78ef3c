"""The base class of procedures: frozen parameters and the hooks that the trainer calls."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from kdrun.errors import InputError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor

    from kdlosses import KDObjective, KDOutput, TokenLoss

MicroBatch = dict[str, Any]
"""A batch from the collator. Under ``"rollout"`` it may contain the ``origins`` of its rows and
``values``: numbers per token, aligned with ``shift_labels``."""
ROLLOUT = "rollout"
State = MutableMapping[str, Any]
"""The state of a procedure between steps: JSON values, the same on every process."""


class Origin(IntEnum):
    """The author of the answer of a row."""

    DATA = 0
    STUDENT = 1
    TEACHER = 2


@dataclass(frozen=True)
class Cost:
    """The maximum cost of a procedure per row of the data in a step, for estimates.

    Attributes:
        rows: number of training rows.
        student_answers: number of answers that the student generates.
        teacher_answers: number of answers that the teacher generates alone or in a mixture.
        teacher_answers_once: whether the teacher answers every prompt before the first step.
    """

    rows: int = 1
    student_answers: float = 0.0
    teacher_answers: float = 0.0
    teacher_answers_once: bool = False


class Settings(Protocol):
    """The configuration of a run, as a procedure reads it: sections with keys."""

    @property
    def model(self) -> Any:
        """The models."""

    @property
    def data(self) -> Any:
        """The rows."""

    @property
    def loss(self) -> Any:
        """The objective."""

    @property
    def token_weight(self) -> Any:
        """The token weight."""

    @property
    def lora(self) -> Any:
        """The adapters."""

    @property
    def procedure(self) -> Any:
        """The procedure and its sampling."""

    @property
    def training(self) -> Any:
        """Steps and batches."""


class SessionProtocol(Protocol):
    """The interface of a run for procedures, implemented by :class:`kdrun.procedures.Session`.

    Attributes:
        settings: the sampling settings.
        teacher: the live teacher.
        vocab_size: heads are cut to this many tokens before sampling.
        seed: seed of all random decisions.
        place: position of this process.
        answers_folder: folder that keeps the teacher's answers for other runs; None keeps none.
        text: windows of plain text, for procedures that use it.
        state: state of the procedure.
        step: number of finished optimiser steps.
        steps: total number of optimiser steps.
        kd_ratio: weight of the loss at this step.
    """

    settings: Any
    teacher: Any
    vocab_size: int
    seed: int
    place: Any
    answers_folder: Path | None
    text: Any
    state: dict[str, Any]
    step: int
    steps: int
    kd_ratio: float

    @property
    def stops(self) -> set[int]:
        """The tokens that end an answer."""

    def say(self, line: str) -> None:
        """Print a line for the user."""

    def draw(self, *what: object) -> float:
        """A random number in [0, 1) for this step, the same on every process."""

    def order(self, count: int, *what: object) -> list[int]:
        """A random permutation of the numbers below ``count``, the same on every process."""

    def text_rows(self, number: int, count: int) -> list[Any]:
        """Windows of :attr:`text` for the rows of a micro-batch."""

    def collate(self, rows: Sequence[Any], like: MicroBatch) -> MicroBatch:
        """Collate rows into a micro-batch, on the device of another one."""

    def write(
        self,
        examples: Sequence[Any],
        number: int,
        writers: Mapping[Origin, float] | None = None,
        with_log_probs: bool = False,
        what: str = "answer",
    ) -> list[Any]:
        """Generate answers to the prompts of rows."""

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        writers: Mapping[Origin, float],
        with_log_probs: bool = False,
        what: str = "answer",
    ) -> list[Any]:
        """Continue prompts, in batches."""

    def agreeing(self) -> AbstractContextManager[None]:
        """A context in which a server's failure on one process is one on all."""

    def teacher_print(self) -> Any:
        """What identifies the model that writes the teacher's answers, as JSON values."""

    def is_empty(self, answer: Sequence[int]) -> bool:
        """Whether an answer is empty or only an end token."""

    def gather(self, things: Sequence[Any]) -> list[Any]:
        """Gather objects from all processes, in the order of their ranks."""


class Procedure(BaseModel):
    """Base class of procedures, which select the training text and weight the losses on it.

    The fields are the parameters, validated with their bounds; all have defaults. Everything that
    changes during training is in the state, which checkpoints keep. Random decisions use
    :meth:`Session.draw`, which depends only on seed and step, so they are the same on every process
    and after a resume.

    Attributes:
        defaults: by ``"section.key"``, values for keys that the user does not set.
        on_policy: whether the student generates text during training.
        takes_text: whether it also trains on plain text (``procedure.text``).
        takes_views: whether its rows keep what the teacher reads instead of the student's prompt.
        mixes_models: whether two models together draw each token, so that no server can.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True
    )

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    on_policy: ClassVar[bool] = True
    takes_text: ClassVar[bool] = False
    mixes_models: ClassVar[bool] = False
    takes_views: ClassVar[bool] = False

    @classmethod
    def parameters(cls) -> dict[str, str]:
        """Names of the parameters for users, mapped to field names.

        They differ if a parameter is a Python keyword, such as ``lambda``.
        """
        return {field.alias or name: name for name, field in cls.model_fields.items()}

    def needs_answers(self, config: Settings) -> bool:
        """Return whether answers of the data are trained on; otherwise prompts are enough.

        Args:
            config: of the run.
        """
        del config
        return True

    def check(self, config: Settings) -> None:
        """Refuse a run that the procedure does not support, before anything is loaded.

        Raises:
            InputError: names the key and the cure.
        """
        name = f"procedure {config.procedure.spec}"
        if config.model.teacher_cache is not None:
            raise InputError(
                f"{name}: a teacher cache contains only the rows of the data, not text that is "
                "generated in the run; remove --teacher-cache and pass --teacher"
            )
        if config.model.teacher is None:
            raise InputError(f"{name}: needs a --teacher")
        self._check_servers(name, config)
        if config.data.teacher_keys and not self.takes_views:
            raise InputError(self.refused_view(config.data.teacher_keys[0]))
        if config.data.packing:
            raise InputError(f"{name}: cannot be used with data.packing=true; remove it")
        if config.training.fsdp:
            raise InputError(
                f"{name}: sharded models cannot generate text; remove training.fsdp=true "
                "(torchrun alone keeps a copy on each process)"
            )
        if config.procedure.text is not None and not self.takes_text:
            raise InputError(f"{name}: does not use procedure.text; remove it")
        ratio_moves = "kd_ratio" in config.loss.schedules
        if self.on_policy and config.loss.kd_ratio == 0 and not ratio_moves:
            raise InputError(
                f"{name}: with --kd-ratio 0 the student's own text has no effect; raise it"
            )

    @classmethod
    def refused_view(cls, what: str) -> str:
        """Return the message for a run in which the teacher reads another prompt.

        Args:
            what: the key or field that says so.
        """
        return (
            f"{what}: procedure {cls.__name__.lower()} shows teacher and student the same prompt; "
            "remove it, or use gkd"
        )

    def _check_servers(self, name: str, config: Settings) -> None:
        """Refuse servers that cannot write the text."""
        given = config.procedure
        served = str(config.model.teacher).startswith(("http://", "https://"))
        if self.mixes_models and (given.writer or given.teacher_writer or served):
            what = "procedure.writer" if given.writer else "procedure.teacher_writer"
            raise InputError(
                f"{name}: mixes teacher and student at each token, which a server with one of them "
                f"cannot; {'pass a local --teacher' if served else f'remove {what}'}"
            )
        if given.writer and not self.on_policy:
            raise InputError(f"{name}: the student writes nothing; remove procedure.writer")
        if given.writer and config.lora.quantization is not None:
            raise InputError(
                "procedure.writer: weights of a quantised student cannot be handed over; remove "
                "lora.quantization"
            )

    def cost(self, config: Settings) -> Cost:
        """The cost of the procedure; by default, one answer of the student per row."""
        return Cost(student_answers=1.0 if self.on_policy else 0.0)

    def initial_state(self) -> dict[str, Any]:
        """The state before the first step."""
        return {}

    def prepare(self, rows: Sequence[Any], session: SessionProtocol) -> Sequence[Any]:
        """Replace the training rows once, before the first step.

        Args:
            rows: examples with ``input_ids`` and ``labels``.
            session: the session, for generating text.
        """
        return rows

    def batches(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        """Return the micro-batches of an optimiser step.

        Args:
            given: the micro-batches of the data.
            session: the session, for generating text, random numbers and the state.

        Returns:
            The same number of micro-batches; their supervised tokens are counted.
        """
        return list(given)

    def loss(self, rows: LossRows) -> KDOutput:
        """The objective of a micro-batch with origins.

        By default all tokens have equal weight, and the objective is that of the run, without
        cross-entropy on text generated by the student.
        """
        return rows.add(
            rows.objective_of(Origin.DATA),
            rows.objective_of(Origin.TEACHER),
            rows.objective_of(Origin.STUDENT, class_loss=False),
        )

    def evaluated(self, state: State, cross_entropy: float) -> None:
        """Process an evaluation on the held-out rows; the first one is before training."""

    def figures(self, state: State) -> dict[str, float]:
        """Values of the state to log."""
        return {}

    def remarks(self, state: State) -> list[str]:
        """Lines to print after training."""
        return []


@dataclass(frozen=True)
class LossRows:
    """A micro-batch inside the call of the student's head.

    Attributes:
        student: source of the student's logits.
        teacher: source of the teacher's logits; None if no teacher runs.
        labels: ``[rows, length]``, aligned with the logits.
        origins: origins of the rows.
        values: values by name, ``[rows, length]``, aligned with ``labels``.
        objective: the objective of the run.
        step_tokens: supervised tokens of the whole step, over all micro-batches and processes.
        origin_tokens: supervised tokens of the step by origin, ``[len(Origin)]``.
    """

    student: Any
    teacher: Any
    labels: Tensor
    origins: tuple[int, ...]
    values: Mapping[str, Tensor]
    objective: KDObjective
    step_tokens: Tensor | int | None
    origin_tokens: Tensor

    def labels_of(self, origin: Origin) -> Tensor:
        """The labels with the rows of other origins ignored."""
        import torch

        rows = torch.tensor([own == origin for own in self.origins], device=self.labels.device)
        ignore = self.objective.loss.ignore_index
        return self.labels.masked_fill(~rows.unsqueeze(1), ignore)

    def objective_of(
        self,
        origin: Origin,
        *,
        class_loss: bool = True,
        kd_loss: bool = True,
        loss: TokenLoss | None = None,
        own_mean: bool = False,
        token_weights: Tensor | None = None,
    ) -> KDOutput | None:
        """The run's objective on the rows of an origin.

        Args:
            origin: origin of the rows.
            class_loss: whether to include cross-entropy, with weight ``1 - kd_ratio``.
            kd_loss: whether to include the loss, with weight ``kd_ratio``.
            loss: loss to use instead of the run's loss.
            own_mean: divide by the step's tokens of this origin instead of all tokens of the step.
            token_weights: weights of the tokens' values, ``[rows, length]``.

        Returns:
            The objective, in which excluded parts are 0; None if there are no such rows.
        """
        from kdlosses import KDObjective

        if origin not in self.origins:
            return None
        run = self.objective
        ratio = run.kd_ratio
        chosen = run.loss if loss is None else loss
        inner = ratio if class_loss and kd_loss else float(kd_loss)
        if self.teacher is None:
            inner = 0.0
        divisor = self.origin_tokens[int(origin)] if own_mean else self.step_tokens
        out: KDOutput = KDObjective(chosen, inner, run.weighting)(
            self.student, self.teacher, self.labels_of(origin), divisor, token_weights=token_weights
        )
        zeros = out.class_loss.new_zeros(len(run.loss.terms))
        if loss is not None and out.kd_loss is not None:
            # Only the terms of the run's own loss are logged.
            out = replace(out, kd_terms=zeros)
        if class_loss and kd_loss:
            return out
        if kd_loss:
            return replace(out, loss=ratio * out.loss, class_loss=zeros.sum())
        return replace(out, loss=(1 - ratio) * out.loss, kd_loss=zeros.sum(), kd_terms=zeros)

    def add(self, *parts: KDOutput | None) -> KDOutput:
        """Add objectives."""
        from kdlosses import KDOutput

        found = [part for part in parts if part is not None]
        zeros = found[0].class_loss.new_zeros(len(self.objective.loss.terms))
        weights = [part.weight_sums for part in found if part.weight_sums is not None]
        return KDOutput(
            loss=_sum([part.loss for part in found]),
            class_loss=_sum([part.class_loss for part in found]),
            kd_loss=_sum([zeros.sum() if p.kd_loss is None else p.kd_loss for p in found]),
            kd_terms=_sum([zeros if part.kd_terms is None else part.kd_terms for part in found]),
            num_tokens=_sum([part.num_tokens for part in found]),
            weight_sums=_sum(weights) if weights else None,
        )


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
