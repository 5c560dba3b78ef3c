"""Adds to transformers' samplers: how much of the batches is padding, and what would leave less."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_TOLD_FROM = 0.15
_SAMPLE = 50_000
BY_LENGTH = "group_by_length"


def padding_of(lengths: np.ndarray, batch_size: int, order: np.ndarray) -> float:
    """Return the share of padding in batches.

    Args:
        lengths: of the examples.
        batch_size: examples in a batch; the last may have fewer.
        order: numbers of the examples.
    """
    import numpy as np

    starts = np.arange(0, len(order), batch_size)
    longest = np.maximum.reduceat(lengths[order], starts)
    sizes = np.diff([*starts, len(order)])
    places = int((longest * sizes).sum())
    return 1 - float(lengths[order].sum()) / places


def describe_padding(
    lengths: np.ndarray, batch_size: int, accumulation: int, by_length: bool
) -> str | None:
    """Describe the padding of a run's batches; None if there is little to say.

    Args:
        lengths: of the training examples.
        batch_size: examples in a batch.
        accumulation: batches in a step.
        by_length: whether batches have examples of similar length.
    """
    import numpy as np
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    if batch_size == 1:
        return None
    some = np.random.default_rng(0).permutation(len(lengths))[:_SAMPLE]
    lengths = lengths[some]
    order = np.arange(len(lengths))
    generator = torch.Generator().manual_seed(0)
    grouped = np.array(
        get_length_grouped_indices(lengths.tolist(), batch_size * accumulation, generator=generator)
    )
    random, sorted_ = (padding_of(lengths, batch_size, one) for one in (order, grouped))
    if by_length:
        return f"batches by length leave {sorted_:.0%} padding ({random:.0%} in random order)"
    if random < _TOLD_FROM:
        return None
    return (
        f"batches leave {random:.0%} padding; trainer.train_sampling_strategy={BY_LENGTH} would "
        f"leave {sorted_:.0%}, and data.packing almost none"
    )
