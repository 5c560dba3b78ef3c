"""Top-k log-probabilities in 16 bits.

What is stored is the distance of each log-probability to that of the most likely token. The
distances determine the distribution, because all events together have probability 1. In float16
they are more exact than the log-probabilities: the most likely token has distance 0, and where the
distribution is flat, so that no probability is near 1, all distances are small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def round_top_k(log_probs: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Round the log-probabilities of a top-k teacher for storage.

    The relative error of a distance is at most 2^-11. One beyond the range of float16 is stored as
    ``-inf``; its token has less than e^-65504 times the mass of the most likely one.

    Args:
        log_probs: ``[..., k]``; entries may be ``-inf``.
        tail: ``[...]``, the log-probability of all other tokens.

    Returns:
        The distances in float16 ``[..., k]`` and that of the tail in float32 ``[...]``.
    """
    import torch

    highest = log_probs.amax(-1, keepdim=True).float()
    highest = torch.nan_to_num(highest, neginf=0.0)  # no token of the k has mass
    distances = log_probs.float() - highest
    return distances.half(), tail.float() - highest.squeeze(-1)


def restore_top_k(log_probs: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities whose events have a sum of 1.

    Args:
        log_probs: ``[..., k]``, log-probabilities up to one constant for each distribution.
        tail: ``[...]``, up to the same constant.

    Returns:
        Both in float32.
    """
    import torch

    events = torch.cat([log_probs.float(), tail.float().unsqueeze(-1)], -1)
    normalised = torch.log_softmax(events, -1)
    return normalised[..., :-1], normalised[..., -1]
