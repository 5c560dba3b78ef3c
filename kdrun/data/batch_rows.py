"""Adds to transformers' collators: the rows of a batch without padding, and columns made from rows.

Teachers that are not models, such as a cache or a server, answer row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdrun.data.collate import IGNORE_INDEX
from kdrun.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class BatchRow:
    """A row of a batch without its padding.

    Attributes:
        number: index of the row in the batch.
        positions: supervised positions in the padded row, ascending.
        within: the same positions in ``ids``.
        ids: tokens of the row.
        key: hash of the tokens and of the supervised positions among them.
    """

    number: int
    positions: Tensor
    within: Tensor
    ids: list[int]
    key: bytes


def rows_of(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    shift_labels: Tensor,
    position_ids: Tensor | None = None,
) -> Iterator[BatchRow]:
    """The rows of a batch with supervised positions, without padding on either side.

    A packed row is split into its examples, which are looked up one by one.

    Args:
        input_ids: ``[rows, length]``.
        attention_mask: same shape; 0 is padding. None if there is no padding.
        shift_labels: same shape, aligned with the logits.
        position_ids: same shape, for packed rows: 0 at the start of each example.

    Raises:
        InputError: a padded position is supervised.
    """
    import torch

    # Keys are bytes, so they are computed on the CPU.
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    columns = (input_ids, mask.bool(), shift_labels != IGNORE_INDEX)
    ids, kept, supervised = (tensor.cpu() for tensor in columns)
    for number in range(len(ids)):
        if (supervised[number] & ~kept[number]).any():
            raise InputError(
                f"row {number + 1} of a batch supervises a padded position; with left padding, "
                "the first token of a row must not be a target (label -100)"
            )
        for part in _parts(len(ids[number]), position_ids, number):
            if not supervised[number, part].any():
                continue
            tokens = ids[number, part][kept[number, part]].long()
            targets = supervised[number, part][kept[number, part]]
            content = hashlib.sha256(tokens.numpy().tobytes())
            content.update(targets.numpy().tobytes())
            positions = supervised[number, part].nonzero().squeeze(1) + part.start
            within = targets.nonzero().squeeze(1)
            yield BatchRow(number, positions, within, tokens.tolist(), content.digest())


def _parts(length: int, position_ids: Tensor | None, number: int) -> list[slice]:
    """The slices of the examples in a row."""
    starts = [0] if position_ids is None else (position_ids[number] == 0).nonzero()[:, 0].tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def fill_columns(
    shape: Sequence[int], found: Sequence[tuple[BatchRow, Sequence[Tensor]]]
) -> list[Tensor]:
    """Put the tensors of rows at their supervised positions; others are 0.

    Args:
        shape: of the batch's token ids, ``[rows, length]``.
        found: rows of the batch, each with tensors whose first axis is its supervised positions.

    Returns:
        One tensor ``[rows, length, ...]`` for each of a row's; none without rows.
    """
    import torch

    columns: list[Tensor] = []
    for row, parts in found:
        if not columns:
            columns = [torch.zeros(*shape, *part.shape[1:], dtype=part.dtype) for part in parts]
        for column, part in zip(columns, parts, strict=True):
            column[row.number, row.positions] = part
    return columns
