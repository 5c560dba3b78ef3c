"""What a procedure is: frozen parameters, and a few hooks that the trainer calls."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

from kdrun.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from kdlosses import KDObjective, KDOutput, TokenLoss

MicroBatch = dict[str, Any]
"""What the collator makes. Under ``"rollout"`` it may carry the origins of its rows, one each, and
``values``: numbers of their tokens, aligned with ``shift_labels``."""
ROLLOUT = "rollout"
State = MutableMapping[str, Any]
"""What a procedure carries from step to step: what JSON can hold, the same on every process."""


class Origin(IntEnum):
    """Who wrote the answer of a row."""

    DATA = 0
    STUDENT = 1
    TEACHER = 2


@dataclass(frozen=True)
class Cost:
    """What a procedure takes for each row of the data in a step, at most; for estimates.

    Attributes:
        rows: that are learned from.
        student_answers: that the student writes.
        teacher_answers: that the teacher writes, or takes part in writing.
        teacher_answers_once: whether the teacher answers every prompt before the first step.
    """

    rows: int = 1
    student_answers: float = 0.0
    teacher_answers: float = 0.0
    teacher_answers_once: bool = False


class Settings(Protocol):
    """A run's configuration as a procedure reads it: its sections, each with its keys."""

    @property
    def model(self) -> Any:
        """Which models."""

    @property
    def data(self) -> Any:
        """Which rows."""

    @property
    def loss(self) -> Any:
        """The objective."""

    @property
    def procedure(self) -> Any:
        """The procedure and its sampling."""

    @property
    def training(self) -> Any:
        """Steps and batches."""


class Desk(Protocol):
    """What a procedure works with in a run; :class:`kdrun.procedures.Session` is it.

    Attributes:
        settings: how answers are sampled.
        teacher: the live teacher.
        vocab_size: heads are cut to this many tokens before anything is drawn.
        seed: of all random decisions.
        place: of this process.
        answers_folder: where the teacher's texts are kept for other runs; None keeps none.
        text: windows of plain text, for procedures that take some.
        state: what the procedure carries from step to step.
        step: optimiser steps done.
        steps: of the whole training.
        kd_ratio: weight of the loss at that step.
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
        """Show a line to the user."""

    def draw(self, *what: object) -> float:
        """A random number in [0, 1) of this step, the same on every process."""

    def order(self, count: int, *what: object) -> list[int]:
        """The numbers below ``count`` in a random order, likewise."""

    def text_rows(self, number: int, count: int) -> list[Any]:
        """Windows of :attr:`text` for the rows of a micro-batch."""

    def collate(self, rows: Sequence[Any], like: MicroBatch) -> MicroBatch:
        """A micro-batch of rows, on the device of another one."""

    def write(
        self,
        examples: Sequence[Any],
        number: int,
        writers: Mapping[Origin, float] | None = None,
        with_log_probs: bool = False,
        what: str = "answer",
    ) -> list[Any]:
        """Answers to what rows ask."""

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        writers: Mapping[Origin, float],
        with_log_probs: bool = False,
        what: str = "answer",
    ) -> list[Any]:
        """Prompts continued, in batches."""

    def is_empty(self, answer: Sequence[int]) -> bool:
        """Whether an answer is no more than its end token."""

    def gather(self, things: Sequence[Any]) -> list[Any]:
        """The things of all processes, those of the first one first."""


class Procedure(BaseModel):
    """Which text is learned from, and how the losses on it are weighed.

    Its fields are its parameters, validated with their bounds; it constructs without arguments.
    Whatever changes in training is in the state, which checkpoints keep. Random decisions are
    :meth:`Session.draw`'s, which follow from seed and step: they are the same on every process
    and after a resume.

    Attributes:
        defaults: by ``"section.key"`` the values of a run with this procedure that the user leaves
            open.
        on_policy: the student writes text while it trains.
        takes_text: it learns from plain text beside its prompts (``procedure.text``).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True
    )

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    on_policy: ClassVar[bool] = True
    takes_text: ClassVar[bool] = False

    @classmethod
    def parameters(cls) -> dict[str, str]:
        """Names of the parameters as users write them, each with the name of its field.

        They differ where a parameter is a Python keyword, such as ``lambda``.
        """
        return {field.alias or name: name for name, field in cls.model_fields.items()}

    def check(self, config: Settings) -> None:
        """Refuse a run that the procedure has no meaning with, before anything is loaded.

        Raises:
            InputError: naming the key and the cure.
        """
        name = f"procedure {config.procedure.spec}"
        if config.model.teacher_cache is not None:
            raise InputError(
                f"{name}: a teacher cache contains only the rows of the data, not text that is "
                "generated in the run; remove --teacher-cache and pass --teacher"
            )
        if config.model.teacher is None:
            raise InputError(f"{name}: needs a --teacher")
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

    def cost(self, config: Settings) -> Cost:
        """What the procedure takes in a run: by default an answer of the student to each row."""
        return Cost(student_answers=1.0 if self.on_policy else 0.0)

    def initial_state(self) -> dict[str, Any]:
        """The state before the first step."""
        return {}

    def prepare(self, rows: Sequence[Any], session: Desk) -> Sequence[Any]:
        """Replace the training rows once, before the first step.

        Args:
            rows: examples with ``input_ids`` and ``labels``.
            session: writes text.
        """
        return rows

    def batches(self, given: Sequence[MicroBatch], session: Desk) -> list[MicroBatch]:
        """The micro-batches of an optimiser step.

        Args:
            given: those of the data.
            session: writes text, draws, and has the state.

        Returns:
            As many. Supervised tokens are counted on them.
        """
        return list(given)

    def loss(self, rows: LossRows) -> KDOutput:
        """The objective of a micro-batch that carries origins.

        By default every token counts alike: the run's objective, without cross-entropy on what the
        student wrote.
        """
        return rows.add(
            rows.objective_of(Origin.DATA),
            rows.objective_of(Origin.TEACHER),
            rows.objective_of(Origin.STUDENT, class_loss=False),
        )

    def evaluated(self, state: State, cross_entropy: float) -> None:
        """Take note of an evaluation on the held-out rows; the first comes before training."""

    def figures(self, state: State) -> dict[str, float]:
        """Numbers of the state that are logged."""
        return {}

    def remarks(self, state: State) -> list[str]:
        """What is to be said after training, a line each."""
        return []


@dataclass(frozen=True)
class LossRows:
    """A micro-batch inside the call of the student's head.

    Attributes:
        student: where the student's logits come from.
        teacher: likewise; None where no teacher runs.
        labels: ``[rows, length]`` aligned with the logits.
        origins: of the rows.
        values: by name ``[rows, length]``, aligned with ``labels``.
        objective: the run's.
        step_tokens: supervised tokens of the whole step, over all micro-batches and processes.
        origin_tokens: the same by origin, ``[len(Origin)]``.
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
            origin: of the rows.
            class_loss: whether cross-entropy takes part, with its weight ``1 - kd_ratio``.
            kd_loss: whether the loss takes part, with its weight ``kd_ratio``.
            loss: in the place of the run's loss.
            own_mean: divide by the step's tokens of this origin, not by all of the step.
            token_weights: ``[rows, length]`` weights of the tokens' values.

        Returns:
            The objective; what takes no part is 0 in it. None without such rows.
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
        out: KDOutput = KDObjective(chosen, inner)(
            self.student, self.teacher, self.labels_of(origin), divisor, token_weights=token_weights
        )
        zeros = out.class_loss.new_zeros(len(run.loss.terms))
        if loss is not None and out.kd_loss is not None:
            # The terms that are logged are the run's own.
            out = replace(out, kd_terms=zeros)
        if class_loss and kd_loss:
            return out
        if kd_loss:
            return replace(out, loss=ratio * out.loss, class_loss=zeros.sum())
        return replace(out, loss=(1 - ratio) * out.loss, kd_loss=zeros.sum(), kd_terms=zeros)

    def add(self, *parts: KDOutput | None) -> KDOutput:
        """The sum of objectives."""
        from kdlosses import KDOutput

        found = [part for part in parts if part is not None]
        zeros = found[0].class_loss.new_zeros(len(self.objective.loss.terms))
        return KDOutput(
            loss=_sum([part.loss for part in found]),
            class_loss=_sum([part.class_loss for part in found]),
            kd_loss=_sum([zeros.sum() if p.kd_loss is None else p.kd_loss for p in found]),
            kd_terms=_sum([zeros if part.kd_terms is None else part.kd_terms for part in found]),
            num_tokens=_sum([part.num_tokens for part in found]),
        )


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
