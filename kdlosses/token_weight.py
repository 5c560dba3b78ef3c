"""The base class of token weights, and the state with which a run uses one."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from kdlosses.definition import Definition

SMALLEST_MEAN = 0.01
_MEMORY = 100


class _Position:
    """Bound by the engine for weights with ``uses_position``; see :meth:`Definition.bind`."""

    def __get__(self, weight: Any, owner: type | None = None) -> Any:
        if weight is None:
            return self
        raise AttributeError(f"{type(weight).__name__}.position: set uses_position = True")


class TokenWeight(Definition):
    """The weight of each supervised token's loss, a function of the two distributions.

    The objective becomes ``sum_i w_i D(p_i, q_i) / num_tokens``: the denominator stays the number
    of supervised tokens. Define :meth:`weigh`; it is evaluated with the loss, plain, chunked, fused
    and vocabulary parallel, without another projection.

    Use a :class:`kdlosses.RowLoss` instead if a gradient should flow through the factor, or if
    different tokens need different losses.

    Class variables (traits):

    Attributes:
        supports_top_k: :meth:`weigh` accepts the teacher's k most likely tokens and one entry for
            all others instead of the vocabulary, with meaningless labels.
        uses_position: :meth:`weigh` reads ``self.position``, an int64 ``[...]``: the number of
            supervised tokens between the token and the beginning of its answer (0 for the first).
    """

    supports_top_k: ClassVar[bool] = False
    uses_position: ClassVar[bool] = False
    position: ClassVar[Any] = _Position()

    @abstractmethod
    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return one weight per row, at least 0; no gradient flows through it.

        Args:
            teacher_log_probs: ``[..., V]`` normalised, finite (log 0 is -1e30), float32, at
                temperature 1 whatever the temperature of the loss.
            student_log_probs: the same for the student, detached.
            labels: ``[...]`` the target token of each row, int64 in ``[0, V)``.

        Returns:
            ``[...]``.
        """

    def next_state(
        self, state: Mapping[str, float], mean: float, share: float, progress: float
    ) -> dict[str, float]:
        """Return the state variables after an optimiser step; stateful weights override this.

        Args:
            state: the variables used in the step.
            mean: mean weight of the supervised tokens of all micro-batches and ranks.
            share: share of these tokens with a weight above 0.
            progress: the completed share of the training, in [0, 1].
        """
        return dict(state)


class TokenWeighting:
    """A token weight in use: what it applies to, its normalisation and its state.

    Args:
        weight: the weight.
        on: ``"kd"`` weights the distillation loss, ``"both"`` cross-entropy as well.
        normalize: ``"none"``, or ``"running"`` to divide by the mean weight of the steps before
            (of about the last 100; the first step is not divided), at least 0.01. A weight with a
            small mean then does not act like a smaller learning rate.

    Raises:
        ValueError: another value of ``on`` or ``normalize``.
    """

    def __init__(
        self,
        weight: TokenWeight,
        on: Literal["kd", "both"] = "kd",
        normalize: Literal["none", "running"] = "none",
    ) -> None:
        if on not in ("kd", "both"):
            raise ValueError(f"on: expected 'kd' or 'both', got {on!r}")
        if normalize not in ("none", "running"):
            raise ValueError(f"normalize: expected 'none' or 'running', got {normalize!r}")
        self.weight = weight
        self.on = on
        self.normalize = normalize
        self.values = weight.initial_state()
        self._mean, self._steps = 1.0, 0

    @property
    def factor(self) -> float:
        """Multiplies the weights: 1 divided by their running mean, or 1."""
        return 1 / max(self._mean, SMALLEST_MEAN) if self.normalize == "running" else 1.0

    @property
    def moves(self) -> bool:
        """Whether :meth:`advance` has an effect."""
        return self.weight.stateful or self.normalize == "running"

    @property
    def named_values(self) -> dict[str, float]:
        """The present state variables and running mean, by name."""
        running = {"running_mean": self._mean} if self.normalize == "running" else {}
        return {f"weight.{name}": value for name, value in {**self.values, **running}.items()}

    def advance(self, progress: float, mean: float, share: float) -> None:
        """Advance state and running mean after an optimiser step; see :meth:`next_state`."""
        self.values = self.weight.next_state(self.values, mean, share, progress)
        self._steps += 1
        self._mean += (mean - self._mean) / min(self._steps, _MEMORY)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "weight": repr(self.weight),
            "values": dict(self.values),
            "mean": self._mean,
            "steps": self._steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state from :meth:`state`.

        Raises:
            ValueError: the state belongs to another weight.
        """
        if state["weight"] != repr(self.weight):
            raise ValueError(
                f"the state was saved with the token weight {state['weight']}, but this one is "
                f"{self.weight!r}"
            )
        self.values = dict(state["values"])
        self._mean, self._steps = float(state["mean"]), int(state["steps"])
