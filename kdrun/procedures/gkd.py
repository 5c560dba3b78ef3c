"""On-policy distillation: the student's own answers, with a probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from kdrun.procedures.base import Cost, Desk, LossRows, MicroBatch, Origin, Procedure, Settings

if TYPE_CHECKING:
    from kdlosses import KDOutput


class GKD(Procedure):
    """Generalised knowledge distillation: with a probability a batch's answers are the student's.

    For each micro-batch one number is drawn, the same on every process. Below lambda the student
    answers the prompts, as it is at that step and without a gradient through the sampling, and the
    loss compares teacher and student on those answers, end token included. Else the batch of the
    data is learned from.

    Reference: Agarwal et al. 2024, arXiv:2306.13649.
    """

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

    def cost(self, config: Settings) -> Cost:
        """A share of the batches is answered."""
        return Cost(student_answers=self.lambda_)

    def batches(self, given: Sequence[MicroBatch], session: Desk) -> list[MicroBatch]:
        """Answers in the place of the data's, by the draw of each micro-batch.

        In a step at ``kd_ratio`` 0 nothing could be learned from them, and the data's stay.
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
        """The run's objective; cross-entropy on the student's answers only where asked for."""
        return rows.add(rows.objective_of(Origin.STUDENT, class_loss=self.class_loss))
