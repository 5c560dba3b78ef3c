"""On-policy distillation on the student's own answers, with a given probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

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
    from kdlosses import KDOutput


class GKD(Procedure):
    """Generalised knowledge distillation: some batches contain the student's own answers.

    One random number is drawn for each micro-batch, the same on every process. If it is below
    lambda, the current student answers the prompts, without a gradient through the sampling, and
    the loss compares teacher and student on these answers, including the end token. Otherwise the
    batch of the data is used.

    Reference: Agarwal et al. 2024, arXiv:2306.13649.
    """

    takes_views: ClassVar[bool] = True

    lambda_: float = Field(
        0.5,
        ge=0,
        le=1,
        alias="lambda",
        description="share of batches whose answers the student generates",
    )
    class_loss: bool = Field(
        False, description="also use cross-entropy on the student's own answers, as on the data"
    )

    def needs_answers(self, config: Settings) -> bool:
        """Only if some rows are taken from the data."""
        del config
        return self.lambda_ < 1

    def cost(self, config: Settings) -> Cost:
        """The cost of answers for a share of the batches."""
        return Cost(student_answers=self.lambda_)

    def batches(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        """Replace answers of the data with the student's, depending on the draw of a micro-batch.

        In a step with ``kd_ratio`` 0 the student's answers have no effect, so the data is kept.
        """
        from kdrun.procedures.sampling import examples_of

        if session.kd_ratio == 0 and not self.class_loss:
            return list(given)
        return [
            session.collate(session.write(examples_of(batch), number), batch)
            if session.draw("gkd", number) < self.lambda_
            else batch
            for number, batch in enumerate(given)
        ]

    def loss(self, rows: LossRows) -> KDOutput:
        """The run's objective, with cross-entropy on the student's answers only if requested."""
        return rows.add(rows.objective_of(Origin.STUDENT, class_loss=self.class_loss))
