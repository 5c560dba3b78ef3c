"""Weights by the entropy of one of the two models."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from kdlosses.token_weight import TokenWeight

Model = Literal["teacher", "student"]


def entropy(log_probs: Tensor) -> Tensor:
    """``-sum p log p`` in nats, ``[...]``, of finite log-probabilities ``[..., V]``."""
    return -(log_probs.exp() * log_probs).sum(-1).clamp_max(0)


class Entropy(TokenWeight):
    """Normalised entropy, w = h^power or, falling, (1 - h)^power with h = -sum p log p / log V.

    ``h`` is between 0 (certain) and 1 (uniform). Rising, the student's entropy favours tokens at
    which it hesitates; falling, the teacher's favours those of which it is certain. With a top-k
    teacher both are over k tokens and one entry for the rest, with V = k + 1.

    Not for rows in which a confident student is wrong, which a rising weight of its entropy hides;
    see ``disagreement``. The mean weight is small for large vocabularies; use
    ``token_weight.normalize=running``.

    Reference: Xu et al. 2026 (TIP), arXiv:2604.14084.
    """

    supports_top_k = True

    of: Model = Field("student", description="whose entropy: teacher or student")
    direction: Literal["rising", "falling"] = Field(
        "rising", description="whether a high entropy gives a high or a low weight"
    )
    power: float = Field(1.0, gt=0, description="exponent; larger values separate tokens more")

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """The entropy relative to its largest value, or 1 minus that, to a power."""
        chosen = teacher_log_probs if self.of == "teacher" else student_log_probs
        # A constant of the graph, since the width is.
        highest = chosen.new_tensor(float(max(2, chosen.shape[-1]))).log()
        share = (entropy(chosen) / highest).clamp(0, 1)
        return (share if self.direction == "rising" else 1 - share) ** self.power
