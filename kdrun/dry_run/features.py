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
# Float32 copies of a chunk's states with their gradients, and matrices of a relation, that exist at
# once, as recorded by the allocator on a CPU.
_COPIES, _MATRICES = 6, 5


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
    chunk = length if plan.relation else min(tokens, config.features.chunk_size)
    states = _COPIES * chunk * (teacher.width + student.width) * _FLOAT
    relation = _MATRICES * length**2 * _FLOAT if plan.relation else 0
    return _OF_A_WEIGHT * _FLOAT * plan.projected + kept + states + relation
