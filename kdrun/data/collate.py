"""Adds to transformers' collators: teacher columns and a mask; labels are shifted here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100
LABELS = ("labels", "shift_labels")
TEACHER = "teacher_"
"""Prefix of the columns of what the teacher reads, where that is another prompt."""
TEACHER_LABELS = f"{TEACHER}shift_labels"
ROW = "row"
"""Optional field of an example with its number in the training set."""


def teacher_side(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the teacher reads of an example, as an example."""
    own = {k.removeprefix(TEACHER): x for k, x in example.items() if k.startswith(TEACHER)}
    return own or example


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Align labels with logits: the target of position i is the label of token i + 1.

    Args:
        labels: ``[..., length]``, each label at the position of its own token.

    Returns:
        ``[..., length]``; the last position has no target.
    """
    import torch

    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def split_inputs(inputs: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the aligned labels of a batch, and the model's inputs."""
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = shift_labels(inputs["labels"])
    features = {
        name: value
        for name, value in inputs.items()
        if name not in (*LABELS, ROW) and not name.startswith(TEACHER)
    }
    return labels, features


def teacher_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a teacher is given of a batch, with ``shift_labels``: its own prompts, if any."""
    own = {k.removeprefix(TEACHER): x for k, x in inputs.items() if k.startswith(TEACHER)}
    if own:
        return own
    labels, features = split_inputs(inputs)
    return {**features, "shift_labels": labels}


@dataclass(frozen=True)
class Collator:
    """Pad examples on the right to the longest of the batch.

    Padding is identified by position, not by id: with ``pad == eos`` the end-of-text token of an
    answer is text, attended to and a target.

    Attributes:
        pad_token_id: Padding id; any id works, since nothing attends to it. `None`, if the
            tokenizer has no padding token, means 0.
    """

    pad_token_id: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Build a batch.

        Args:
            examples: ``input_ids`` and ``labels`` of equal length, as `kdrun.data.encode` makes
                them; or all with ``position_ids`` as well, as `kdrun.data.pack` makes them.

        Returns:
            Tensors ``[rows, length]``: ``input_ids``; ``attention_mask``; ``labels``, each at its
            own token, in Hugging Face's convention; ``shift_labels``, aligned with the logits.
            Packed rows have ``position_ids`` instead of the mask, as transformers requires; their
            padding is one more example, which nothing attends to. ``row`` is ``[rows]``, if the
            examples have numbers. If the teacher reads another prompt in any row, there is the
            same of what it reads, with names that begin with ``teacher_`` and without labels that
            are not aligned, ``[rows, teacher_length]``.
        """
        batch = self._padded(examples)
        if not any(f"{TEACHER}input_ids" in example for example in examples):
            return batch
        seen = self._padded([teacher_side(example) for example in examples])
        kept = (name for name in seen if name not in ("labels", ROW))
        return {**batch, **{f"{TEACHER}{name}": seen[name] for name in kept}}

    def _padded(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Build the batch of one side."""
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), length)
        input_ids = torch.full(shape, self.pad_token_id or 0, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            input_ids[row, :size] = torch.as_tensor(example["input_ids"], dtype=torch.long)
            attention_mask[row, :size] = 1
            labels[row, :size] = torch.as_tensor(example["labels"], dtype=torch.long)
        batch = {"input_ids": input_ids, "labels": labels, "shift_labels": shift_labels(labels)}
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([example[ROW] for example in examples])
        if "position_ids" not in examples[0]:
            return {**batch, "attention_mask": attention_mask}
        position_ids = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            positions = torch.as_tensor(example["position_ids"], dtype=torch.long)
            position_ids[row, : len(positions)] = positions
        return {**batch, "position_ids": position_ids}
