"""Contrastive distillation: one loss on the teacher's text, another on the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from kdrun.errors import InputError
from kdrun.procedures.base import (
    Cost,
    LossRows,
    MicroBatch,
    Origin,
    Procedure,
    SessionProtocol,
    Settings,
)

if TYPE_CHECKING:
    from kdlosses import KDOutput, Term, TokenLoss


class DistiLLM2(Procedure):
    """Contrastive distillation: skew KL on the teacher's answers, skew reverse KL on the student's.

    The teacher answers all prompts once, before the first step. In each step, the student also
    answers the prompts of the batch. The run's loss, by default ``skew_forward_kl``, is used on the
    teacher's answers and raises their likelihood; ``student_loss`` is used on the student's answers
    and lowers the likelihood of those that the teacher would not give. Each is a mean over its own
    tokens, and ``student_weight`` is the weight of the second.

    Reference: Ko et al. 2025, arXiv:2503.07067.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"loss.spec": "skew_forward_kl_chunked", "loss.kd_ratio": 1.0}
    )

    student_loss: str = Field(
        "skew_reverse_kl",
        description="loss on the student's answers, such as skew_reverse_kl:alpha=0.2; it is "
        "chunked if the run's loss is",
    )
    student_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="weight of the student's answers; the teacher's answers get the rest",
    )

    @field_validator("student_loss")
    @classmethod
    def _check_loss(cls, spec: str) -> str:
        from kdlosses import LossSpecError, find_loss, parse_spec

        try:
            parsed = parse_spec(spec)
            if any(term.file for term in parsed.terms):
                raise ValueError(
                    "the loss of a file is not recorded here; make a package of it with 'kdrun "
                    "losses new NAME --from FILE.py:CLASS'"
                )
            for term in parsed.terms:
                find_loss(term.name)
        except LossSpecError as error:
            raise ValueError(str(error)) from error
        if parsed.chunked:
            raise ValueError("remove _chunked; the loss is chunked if the run's loss is")
        return spec

    def needs_answers(self, config: Settings) -> bool:
        """Teacher and student write all of them."""
        del config
        return False

    def check(self, config: Settings) -> None:
        """Also check the loss on the student's answers.

        Raises:
            InputError: that loss cannot be built, or has state.
        """
        super().check(config)
        _check_buildable(self.student_loss, config.loss.match_curvature)

    def prepare(self, rows: Sequence[Any], session: SessionProtocol) -> Sequence[Any]:
        """Replace the answers of rows with those of the teacher.

        Raises:
            InputError: as in :meth:`check`, for trainers that check no configuration.
        """
        from kdrun.procedures.teacher_text import teacher_rows

        _check_buildable(self.student_loss, match_curvature=False)
        return teacher_rows(rows, session)

    def cost(self, config: Settings) -> Cost:
        """The cost of one answer of the teacher, generated once, and one of the student."""
        return Cost(rows=2, student_answers=1.0, teacher_answers_once=True)

    def batches(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        """Return the teacher's answers and the student's answers to the same prompts."""
        from kdrun.procedures.sampling import examples_of, sample_of

        made = []
        for number, batch in enumerate(given):
            examples = examples_of(batch)
            theirs = [sample_of(example, Origin.TEACHER) for example in examples]
            made.append(session.collate([*theirs, *session.write(examples, number)], batch))
        return made

    def loss(self, rows: LossRows) -> KDOutput:
        """Use the run's objective on the teacher's answers, and the other loss on the student's."""
        of_student = _loss_like(self.student_loss, rows.objective.loss)
        return rows.add(
            _scaled(rows.objective_of(Origin.TEACHER, own_mean=True), 1 - self.student_weight),
            _scaled(
                rows.objective_of(Origin.STUDENT, class_loss=False, loss=of_student, own_mean=True),
                self.student_weight,
            ),
        )


def _check_buildable(spec: str, match_curvature: bool) -> None:
    from kdlosses import BrokenLossError, TokenLoss

    name = f"procedure distillm2: student_loss={spec}"
    try:
        loss = TokenLoss(_terms(spec), match_curvature=match_curvature)
    except (ValueError, BrokenLossError) as error:
        raise InputError(f"{name}: {error}") from error
    if loss.stateful:
        raise InputError(
            f"{name} carries state between steps, which only the run's own loss may; choose "
            "another loss"
        )


def _scaled(out: KDOutput | None, factor: float) -> KDOutput | None:
    if out is None:
        return None
    return replace(
        out,
        loss=factor * out.loss,
        class_loss=factor * out.class_loss,
        kd_loss=None if out.kd_loss is None else factor * out.kd_loss,
        kd_terms=None if out.kd_terms is None else factor * out.kd_terms,
    )


def _loss_like(spec: str, run: TokenLoss) -> TokenLoss:
    """Build a loss that is evaluated in the same way as the run's."""
    from kdlosses import TokenLoss

    return TokenLoss(
        _terms(spec),
        chunking=run.chunking,
        temperature=run.temperature,
        temperature_scaling=run.temperature_scaling,
        ignore_index=run.ignore_index,
        vocab_size=run.vocab_size,
        match_curvature=run.match_curvature,
    )


@lru_cache
def _terms(spec: str) -> tuple[Term, ...]:
    from kdlosses import get_loss

    return get_loss(spec).terms
