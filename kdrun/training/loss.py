"""The loss of a micro-batch, which consumes the logits of the student's head."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdlosses import KDObjective, KDOutput
from kdrun.data.collate import IGNORE_INDEX, ROW, split_inputs
from kdrun.models.heads import Consumer, Teacher
from kdrun.models.view import source_of
from kdrun.procedures.base import ROLLOUT, LossRows, Procedure
from kdrun.training.guard import BadLoss, LossGuard


@dataclass(frozen=True)
class StepTokens:
    """Supervised tokens of an optimiser step, over all micro-batches and processes.

    Attributes:
        all: their number; None counts those of the micro-batch.
        by_origin: ``[len(Origin)]``, by the author of their rows.
    """

    all: Tensor | int | None
    by_origin: Tensor


def prepare_loss(
    inputs: Mapping[str, Any],
    objective: KDObjective,
    teacher: Teacher | None,
    procedure: Procedure | None,
    tokens: StepTokens,
    guard: LossGuard | None,
    ask_always: bool = False,
) -> tuple[Consumer, dict[str, Any]]:
    """Return the consumer that evaluates a micro-batch, and the inputs of the student's call.

    Args:
        inputs: the micro-batch; its ``rollout`` is passed to the procedure.
        objective: objective of the run.
        teacher: the teacher; not evaluated at a ratio of 0.
        procedure: evaluates rows with origins; None uses the objective for all.
        tokens: tokens that the loss is divided by.
        guard: records a loss that is not finite; None disables the check.
        ask_always: call the teacher at a ratio of 0 too, for its hidden states.

    Returns:
        The consumer for the student's head, which returns ``loss``, ``class_loss``, ``kd_loss``,
        ``kd_terms``, ``weight_sums`` and ``num_tokens``; and the features.
    """
    rollout = inputs.get(ROLLOUT)
    labels, features = split_inputs(
        {name: value for name, value in inputs.items() if name != ROLLOUT}
    )
    source = None
    if teacher is not None and (objective.kd_ratio > 0 or ask_always):
        source = source_of(teacher, {k: x for k, x in inputs.items() if k != ROLLOUT})

    def evaluate(student: Any) -> KDOutput:
        if rollout is None or procedure is None:
            out: KDOutput = objective(student, source, labels, tokens.all)
            return out
        return procedure.loss(
            LossRows(
                student=student,
                teacher=source,
                labels=labels,
                origins=rollout["origins"],
                values=rollout["values"],
                objective=objective,
                step_tokens=tokens.all,
                origin_tokens=tokens.by_origin,
            )
        )

    def consume(student: Any) -> dict[str, Tensor]:
        out = evaluate(student)
        zeros = out.class_loss.new_zeros(len(objective.loss.terms))
        unweighted = zeros.new_zeros(3)
        if guard is not None:
            _watch(guard, out, lambda only: objective(student, source, only), inputs)
        return {
            "loss": out.loss,
            "class_loss": out.class_loss,
            "kd_loss": zeros.sum() if out.kd_loss is None else out.kd_loss,
            "kd_terms": zeros if out.kd_terms is None else out.kd_terms,
            "weight_sums": unweighted if out.weight_sums is None else out.weight_sums,
            "num_tokens": out.num_tokens,
        }

    return consume, features


def _watch(
    guard: LossGuard,
    out: KDOutput,
    again: Callable[[Tensor], KDOutput],
    inputs: Mapping[str, Any],
) -> None:
    """Check that a loss is finite, and find the rows that cause it if it is not.

    Args:
        guard: records a loss that is not finite.
        out: output for the whole micro-batch.
        again: computes the output for other labels; called for each row separately.
        inputs: the batch.
    """
    value = out.loss.detach().item()
    if math.isfinite(value):
        return
    labels, _ = split_inputs(inputs)
    rows = []
    for place, number in enumerate(inputs[ROW].tolist() if ROW in inputs else ()):
        only = torch.full_like(labels, IGNORE_INDEX)
        only[place] = labels[place]
        with torch.no_grad():
            if not math.isfinite(again(only).loss.item()):
                rows.append(number)
    kd = None if out.kd_loss is None else out.kd_loss.item()
    guard.note(BadLoss(value, out.class_loss.item(), kd, tuple(rows)))
