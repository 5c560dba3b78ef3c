"""The loss of a micro-batch: what the student's head hands its logits to."""

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
from kdrun.procedures.base import ROLLOUT, LossRows, Procedure
from kdrun.training.guard import BadLoss, LossGuard


@dataclass(frozen=True)
class StepTokens:
    """Supervised tokens of an optimiser step, over all micro-batches and processes.

    Attributes:
        all: their number; None takes those of the micro-batch.
        by_origin: ``[len(Origin)]``, by who wrote their rows.
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
) -> tuple[Consumer, dict[str, Any]]:
    """What evaluates a micro-batch, and the inputs of the student's call that it goes into.

    Args:
        inputs: the micro-batch; its ``rollout`` goes to the procedure.
        objective: of the run.
        teacher: what is distilled; it is not asked at a ratio of 0.
        procedure: evaluates rows that carry their origins; None leaves all to the objective.
        tokens: that the loss is divided by.
        guard: notes a loss that is not finite; None looks at no value.

    Returns:
        The consumer for the student's head, which gives ``loss``, ``class_loss``, ``kd_loss``,
        ``kd_terms`` and ``num_tokens``; and the features.
    """
    rollout = inputs.get(ROLLOUT)
    labels, features = split_inputs(
        {name: value for name, value in inputs.items() if name != ROLLOUT}
    )
    source = None
    if teacher is not None and objective.kd_ratio > 0:
        source = teacher.source(**features, shift_labels=labels)

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
        if guard is not None:
            _watch(guard, out, lambda only: objective(student, source, only), inputs)
        return {
            "loss": out.loss,
            "class_loss": out.class_loss,
            "kd_loss": zeros.sum() if out.kd_loss is None else out.kd_loss,
            "kd_terms": zeros if out.kd_terms is None else out.kd_terms,
            "num_tokens": out.num_tokens,
        }

    return consume, features


def _watch(
    guard: LossGuard,
    out: KDOutput,
    again: Callable[[Tensor], KDOutput],
    inputs: Mapping[str, Any],
) -> None:
    """Look whether a loss is finite, and which rows it comes from where it is not.

    Args:
        guard: is told of a loss that is not.
        out: of the whole micro-batch.
        again: the same for other labels; it is asked for each row alone.
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
