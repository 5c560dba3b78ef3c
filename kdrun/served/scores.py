"""Log-probabilities of prompt tokens as a server gives them, checked and in tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdrun.served.client import BadAnswerError

if TYPE_CHECKING:
    from torch import Tensor

_TOLERANCE = 1e-3
"""How far masses may exceed 1 by rounding."""


def read_scores(
    answer: Any, ids: Sequence[int], positions: Sequence[int], k: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the distributions after some positions of a prompt.

    Entry ``j`` of an answer is the distribution from which token ``j`` of the prompt was drawn: it
    belongs to the logits of position ``j - 1``. It has the ``k`` most likely tokens, and the
    prompt's own where that is none of them; they are told apart by rank.

    Args:
        answer: of ``/v1/completions``, parsed.
        ids: the prompt.
        positions: of the logits wanted, each with a token after it.
        k: entries for each.
        vocab_size: tokens that teacher and student share.

    Returns:
        For each position: log-probabilities ``[n, k]`` in float32, tokens ``[n, k]``, and the
        log-probability of all other tokens ``[n]``.

    Raises:
        BadAnswerError: anything is missing or impossible.
    """
    import torch

    try:
        entries = answer["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswerError("the answer has no prompt_logprobs") from error
    if not isinstance(entries, list) or len(entries) != len(ids):
        count = len(entries) if isinstance(entries, list) else 0
        raise BadAnswerError(f"it scores {count} positions of a prompt of {len(ids)} tokens")
    rows = [_most_likely(entries[position + 1], k, vocab_size) for position in positions]
    log_probs = torch.tensor([[x for _, x in row] for row in rows], dtype=torch.float64)
    indices = torch.tensor([[token for token, _ in row] for row in rows])
    mass = log_probs.exp().sum(-1)
    if (mass > 1 + _TOLERANCE).any():
        raise BadAnswerError(f"the probabilities of a position add up to {float(mass.max()):.4f}")
    # Rounding may leave a little more than 1; nothing is then left for the tail.
    log_probs = log_probs - mass.clamp(min=1).log().unsqueeze(-1)
    tail = torch.log1p(-mass.clamp(max=1))
    return log_probs.float(), indices, tail.float()


def _most_likely(entry: Any, k: int, vocab_size: int) -> list[tuple[int, float]]:
    """Return the ``k`` most likely tokens of a position with their log-probabilities."""
    try:
        found = [
            (value["rank"], int(token), float(value["logprob"])) for token, value in entry.items()
        ]
        found = sorted(one for one in found if one[0] <= k)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadAnswerError("a position has no log-probabilities by token and rank") from error
    if len(found) < k:
        raise BadAnswerError(f"a position has {len(found)} of {k} log-probabilities")
    for _, token, log_prob in found[:k]:
        if not math.isfinite(log_prob) or log_prob > _TOLERANCE:
            raise BadAnswerError(f"token {token} has the log-probability {log_prob}")
        if not 0 <= token < vocab_size:
            raise BadAnswerError(
                f"token {token} is outside the vocabulary of {vocab_size} tokens that teacher and "
                "student share"
            )
    if len({token for _, token, _ in found[:k]}) < k:
        raise BadAnswerError("a position has a token twice")
    return [(token, log_prob) for _, token, log_prob in found[:k]]
