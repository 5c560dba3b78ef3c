"""Sequence-level distillation: the teacher's answers as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from kdrun.procedures.base import Cost, Desk, Procedure, Settings


class SeqKD(Procedure):
    """Sequence-level knowledge distillation: likelihood of answers that the teacher writes once.

    Before the first step the teacher answers the prompts of all training rows, by default greedily.
    The answers take the place of the data's, and are kept for other runs with the same teacher,
    prompts and sampling. By default the student learns by cross-entropy alone; ``--kd-ratio`` adds
    the loss between the distributions.

    Reference: Kim and Rush 2016, arXiv:1606.07947.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"loss.kd_ratio": 0.0, "procedure.sampling_temperature": 0.0}
    )
    on_policy: ClassVar[bool] = False

    def cost(self, config: Settings) -> Cost:
        """All is written before training."""
        return Cost(teacher_answers_once=True)

    def prepare(self, rows: Sequence[Any], session: Desk) -> Sequence[Any]:
        """The rows with the teacher's answers."""
        from kdrun.procedures.teacher_text import teacher_rows

        return teacher_rows(rows, session)
