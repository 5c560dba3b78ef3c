"""The memory of a term on hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kdlosses import Hidden
    from kdrun.config.sections import RunConfig
    from kdrun.losses.features import FeaturePlan

_FLOAT = 4
# A weight of a projector, its gradient, and two values of the optimiser.
_OF_A_WEIGHT = 4
# What exists at once in float32, as recorded on a CPU: copies of a chunk's states, of both sides,
# with their gradients (3 without a projector, 5 with one); of a relation one copy, and matrices of
# pairs of tokens.
_COPIES, _COPIES_OF_RELATIONS, _MATRICES = 5, 1, 5


def feature_bytes(
    plan: FeaturePlan,
    config: RunConfig,
    teacher: Hidden,
    student: Hidden,
    rows: int,
    length: int,
    item_size: int,
) -> int:
    """Return the bytes of a micro-batch in which every token is compared.

    Args:
        plan: pairs and projectors.
        config: configuration of the run, with types settled.
        teacher: layers and width of the teacher.
        student: the same of the student.
        rows: rows of the batch.
        length: tokens per row.
        item_size: bytes of an element of the student's states.
    """
    tokens = rows * length
    of_teacher: int = getattr(torch, config.model.teacher_type).itemsize * teacher.width
    layers = len({pair[0] for pair in plan.pairs})
    kept = tokens * (layers * of_teacher + len(plan.pairs) * student.width * item_size)
    at_once = _COPIES * min(tokens, config.features.chunk_size) * (teacher.width + student.width)
    if plan.relation:
        states = _COPIES_OF_RELATIONS * (teacher.width + student.width)
        at_once = length * (states + _MATRICES * length)
    return kept + _FLOAT * (_OF_A_WEIGHT * plan.projected + at_once)
