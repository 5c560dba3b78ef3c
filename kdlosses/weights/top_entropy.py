"""A selection of the tokens with the highest entropy."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from kdlosses.definition import state_variable
from kdlosses.token_weight import TokenWeight
from kdlosses.weights.entropy import Model, entropy


class TopEntropy(TokenWeight):
    """The share of tokens with the highest entropy, w = 1 if -sum p log p > threshold, else 0.

    The threshold is a running quantile: after each step it moves by ``rate * (s - share)`` nats,
    where s is the share of the step's tokens above it. It starts at 0, so that the first steps use
    more tokens.

    Not for short trainings: the threshold needs several ``1 / rate`` steps to rise by a nat.

    Reference: Wang et al. 2025, arXiv:2506.01939 (the 20 % of tokens with the highest entropy);
    Xu et al. 2026 (TIP), arXiv:2604.14084 (50 %, for distillation).
    """

    supports_top_k = True

    of: Model = Field("student", description="whose entropy: teacher or student")
    share: float = Field(0.5, gt=0, lt=1, description="share of the tokens that is used")
    rate: float = Field(0.5, gt=0, description="how fast the threshold moves, in nats per step")

    @state_variable
    def threshold(self) -> float:
        """Tokens with a higher entropy are used, in nats."""
        return 0.0

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """1 above the threshold, else 0."""
        chosen = teacher_log_probs if self.of == "teacher" else student_log_probs
        above: Tensor = entropy(chosen) > self.threshold
        return above.to(chosen.dtype)

    def next_state(
        self, state: Mapping[str, float], mean: float, share: float, progress: float
    ) -> dict[str, float]:
        """Raise the threshold if too many tokens were above it, and lower it otherwise."""
        moved = state["threshold"] + self.rate * (share - self.share)
        return {"threshold": max(0.0, moved)}
