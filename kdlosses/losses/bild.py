"""Bi-directional logits difference."""

import torch
from pydantic import Field
from torch import Tensor

from kdlosses.divergence import RowLoss
from kdlosses.numerics import LOG_ZERO, finite_log_probs, kl_terms, log_softmax


class BiLD(RowLoss):
    """Logits difference, KL(D p || D q) on the teacher's top k + KL(D p || D q) on the student's.

    D p is the softmax over the pairs i < j of the k tokens, in the order of the side that chose
    them, of the differences log p_i - log p_j; D q likewise. The student should reproduce by how
    much each of the best tokens leads the others; the tail of the vocabulary has no effect. Pairs
    with a token that the choosing side rules out are left out.

    Not recommended alone, because the value is 0 for many students besides the teacher: the mass
    of the k tokens as a whole is not compared. The value jumps where two tokens change places in an
    order; of tokens with equal logits at rank k, any may be chosen. The authors use temperature 3.

    Reference: Li et al. 2024 (BiLD), arXiv:2406.13555.
    """

    k: int = Field(8, ge=2, le=64, description="most likely tokens of either side")

    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The divergences on both choices of tokens."""
        k = min(self.k, teacher_log_probs.shape[-1])
        values = []
        for leader in (teacher_log_probs, student_log_probs.detach()):
            tokens = _best(leader, k)
            possible = leader.gather(-1, tokens) > LOG_ZERO / 2
            teacher = _pairs(teacher_log_probs.gather(-1, tokens), possible)
            student = _pairs(student_log_probs.gather(-1, tokens), possible)
            values.append(kl_terms(teacher, student).sum(-1))
        return values[0] + values[1]


def _best(log_probs: Tensor, k: int) -> Tensor:
    """The k most likely tokens in order, ``[..., k]``; the lower of two equal tokens is first."""
    tokens = log_probs.topk(k, dim=-1).indices.sort(-1).values
    order = log_probs.gather(-1, tokens).sort(stable=True, dim=-1, descending=True).indices
    return tokens.gather(-1, order)


def _pairs(log_probs: Tensor, counted: Tensor) -> Tensor:
    """Log-probabilities ``[..., k (k - 1) / 2]`` of the pairs of ``[..., k]`` tokens.

    A pair of a possible and an impossible token has an infinite difference, which leaves no mass
    for pairs with finite ones.
    """
    k = log_probs.shape[-1]
    first, second = torch.triu_indices(k, k, offset=1, device=log_probs.device).unbind()
    possible = log_probs > LOG_ZERO / 2
    known = torch.where(possible, log_probs, 0.0)
    gaps = known[..., first] - known[..., second]
    counts = counted[..., first] & counted[..., second]
    infinities = possible[..., first].int() - possible[..., second].int()
    level = torch.where(counts, infinities, -2)
    highest = level == level.amax(-1, keepdim=True)
    return finite_log_probs(log_softmax(torch.where(highest & counts, gaps, LOG_ZERO)))
