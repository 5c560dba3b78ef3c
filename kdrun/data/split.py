"""Adds to datasets' splits: rows are held out by their content, rows of one prompt together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kdrun.errors import InputError

if TYPE_CHECKING:
    from kdrun.data.row_store import Rows


def shared_prompts(train: Rows, held_out: Rows) -> int:
    """Return held-out rows with the same prompt as a training row."""
    return _shared(train, held_out, "prompt")


def shared_rows(train: Rows, held_out: Rows) -> int:
    """Return held-out rows that are also training rows."""
    return _shared(train, held_out, "own")


def _shared(train: Rows, held_out: Rows, name: str) -> int:
    import numpy as np

    return int(np.isin(held_out.hashes(name), train.hashes(name)).sum())


def hold_out(
    rows: Rows, fraction: float = 0.05, by: Literal["prompt", "content"] = "prompt"
) -> tuple[Rows, Rows]:
    """Split rows into those to train on and those to evaluate on.

    The rows with the smallest hashes are held out. The split is therefore independent of the order
    of rows and the seed, and a data set that grows keeps most of its held-out rows. Rows with the
    same prompt (everything before the last answer) stay on one side: held-out prompts that were
    trained on would flatter the measures. If all prompts are equal, rows are split by answer.

    Args:
        rows: all rows.
        fraction: the share to hold out; at least one row stays on each side.
        by: ``content`` keeps only identical rows together, as earlier versions did.

    Returns:
        The training rows and the held-out rows, both in the order of `rows`.

    Raises:
        InputError: there are no two different rows.
    """
    import numpy as np

    different, rank = np.unique(rows.hashes("own"), return_inverse=True)
    if len(different) < 2:
        raise InputError(
            f"{rows.position(0).file if len(rows) else 'the data'}: at least two different rows "
            "are needed to hold some out for evaluation; add rows, or pass --eval-data"
        )
    prompts, group = np.unique(rows.hashes("prompt"), return_inverse=True)
    if by == "content" or len(prompts) < 2:
        group = rank
    # A group is ordered by its first row's hash, so that single rows keep their order.
    sizes = np.bincount(group)
    place = np.full(len(sizes), len(rows))
    np.minimum.at(place, group, rank)
    order = np.argsort(place, kind="stable")[:-1]
    wanted = max(1, round(fraction * len(rows)))
    count = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    held_out = np.isin(group, order[:count])
    return rows.some(np.flatnonzero(~held_out)), rows.some(np.flatnonzero(held_out))
