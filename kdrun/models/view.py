"""The teacher's distributions of a batch at the student's positions, whatever the teacher reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdlosses import Logits, Projected, Sampled, TopK
from kdrun.data.collate import IGNORE_INDEX, TEACHER, TEACHER_LABELS, split_inputs, teacher_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from kdrun.models.heads import Teacher

_OF_POSITIONS = {
    Projected: ("hidden",),
    Logits: ("values",),
    TopK: ("log_probs", "indices", "tail_log_prob"),
    Sampled: ("log_probs", "indices"),
}
"""The tensors of a source that have an entry for each position, unlike its head."""


def source_of(teacher: Teacher, inputs: Mapping[str, Any]) -> Any:
    """Return a teacher for :class:`kdlosses.KDObjective`, aligned with the student's logits.

    Args:
        teacher: reads its own prompts, if the batch has them.
        inputs: the batch.

    Raises:
        ValueError: the targets of both sides differ, or those of the teacher's side are not given.
    """
    if f"{TEACHER}input_ids" not in inputs:
        return teacher.source(**teacher_inputs(inputs))
    if TEACHER_LABELS not in inputs:
        raise ValueError(f"{TEACHER_LABELS}: needed with {TEACHER}input_ids, got none")
    source = teacher.source(**teacher_inputs(inputs))
    labels, _ = split_inputs(inputs)
    return aligned(source, inputs[TEACHER_LABELS], labels)


def aligned(source: Any, seen_labels: Tensor, labels: Tensor) -> Any:
    """Move a teacher's distributions from its targets to the same targets of the student.

    The n-th target of a row is the n-th on both sides. Other positions, which no loss reads, are 0.

    Args:
        source: of the teacher, with a leading shape ``[rows, teacher_length]``.
        seen_labels: ``[rows, teacher_length]``, aligned with the teacher's logits.
        labels: ``[rows, length]``, aligned with the student's.

    Returns:
        The source with a leading shape ``[rows, length]``.

    Raises:
        ValueError: a row has other targets, so that tokens would be paired with their neighbours.
    """
    import torch

    there, here = seen_labels != IGNORE_INDEX, labels != IGNORE_INDEX
    same = torch.equal(there.sum(-1), here.sum(-1)) and torch.equal(
        seen_labels[there], labels[here]
    )
    if not same:
        raise ValueError(
            "teacher_shift_labels: the targets of a row must be those of shift_labels, in order"
        )

    def moved(values: Tensor) -> Tensor:
        found = values.new_zeros(*labels.shape, *values.shape[2:])
        found[here] = values[there]
        return found

    names = _OF_POSITIONS[type(source)]
    return replace(source, **{name: moved(getattr(source, name)) for name in names})
