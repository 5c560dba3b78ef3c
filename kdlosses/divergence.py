"""The two base classes of distillation losses: :class:`Divergence` and :class:`RowLoss`.

A loss is a small pure function of two next-token distributions, defined by a frozen pydantic model:
its annotated fields are its hyper-parameters, validated with their bounds, and its class variables
are its traits, the declared properties that the conformance checks verify.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from kdlosses.definition import Definition


class Loss(Definition):
    """Common base class of :class:`Divergence` and :class:`RowLoss`; derive from one of these.

    Every hyper-parameter has a default, so that a loss can be constructed without arguments.

    Class variables (traits; the defaults describe an ordinary divergence):

    Attributes:
        zero_at_equality: the value is 0 if the two distributions are equal.
        nonnegative: no value, and for a divergence no term of the sum, is below 0.
        coarse_graining_monotone: merging tokens never increases the value (f-divergences, Renyi).
        temperature_power: near equality the value decreases like ``T ** -temperature_power`` if
            both sides are softened by a temperature T; the softened term is multiplied by
            ``T ** temperature_power`` (Hinton et al. 2015, arXiv:1503.02531, for the power 2).
        detached: names of the quantities through which no gradient flows by design.
    """

    zero_at_equality: ClassVar[bool] = True
    nonnegative: ClassVar[bool] = True
    coarse_graining_monotone: ClassVar[bool] = False
    temperature_power: ClassVar[int] = 2
    detached: ClassVar[tuple[str, ...]] = ()

    def curvature(self) -> float | None:
        """Second-order strength near equality, relative to the KL divergence (which has 1).

        For ``q`` close to ``p`` the value is ``curvature / 2 * sum (p - q)^2 / p``. None if the
        loss has no such expansion (total variation) or declares none.
        """
        return None

    def next_state(
        self, state: Mapping[str, float], value: float, progress: float
    ) -> dict[str, float]:
        """Return the state variables after an optimiser step; stateful losses override this method.

        Args:
            state: the variables used in the step.
            value: the loss of the step: its mean over the supervised tokens of all micro-batches
                and ranks, including the temperature factor.
            progress: the completed share of the training, in [0, 1].
        """
        return dict(state)


class Divergence(Loss):
    """A loss that is additive over the vocabulary: ``finish(sum_v integrand(log p_v, log q_v))``.

    ``p`` is the teacher, ``q`` the student. Define :meth:`integrand`; the plain, chunked and fused
    evaluations, softening, masking and gradients are derived from it.

    Use :class:`RowLoss` instead if a term needs the whole row (a ranking, a split by mass).

    Attributes:
        reduction: ``"sum"``, or ``"logsumexp"`` if the terms are logarithms because a plain sum
            would overflow (Renyi); their logsumexp is then passed to :meth:`finish`.
        linear_finish: :meth:`finish` is linear, so an unbiased estimate of the total gives an
            unbiased estimate of the loss.
    """

    reduction: ClassVar[Literal["sum", "logsumexp"]] = "sum"
    linear_finish: ClassVar[bool] = True

    @abstractmethod
    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Return one term per vocabulary entry.

        Args:
            teacher_log_probs: ``[..., V]`` normalised, finite (log 0 is -1e30), float32.
            student_log_probs: the same for the student; the gradient flows through these.

        Returns:
            ``[..., V]``, computed elementwise: entry v depends only on entry v.
        """

    def finish(self, total: Tensor) -> Tensor:
        """Turn the reduced terms ``[...]`` into the value ``[...]``; the identity by default."""
        return total


class RowLoss(Loss):
    """A loss that needs the whole row: a ranking, a head/tail split, mixed logits, the label.

    Prefer :class:`Divergence` if the loss is a sum over the vocabulary: only this form works with
    sampled teachers and with a vocabulary sharded across devices.

    Attributes:
        supports_top_k: :meth:`row` accepts the teacher's k most likely tokens and one entry for all
            others instead of the vocabulary, with meaningless labels.
    """

    supports_top_k: ClassVar[bool] = False

    @abstractmethod
    def row(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return one value per row.

        Args:
            teacher_log_probs: ``[..., V]`` normalised, finite (log 0 is -1e30), float32.
            student_log_probs: the same for the student; the gradient flows through these.
            labels: ``[...]`` the target token of each row, int64 in ``[0, V)``.

        Returns:
            ``[...]``.
        """
