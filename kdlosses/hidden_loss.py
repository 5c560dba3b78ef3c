"""The two base classes of losses on hidden states: :class:`FeatureLoss` and :class:`RelationLoss`.

Such a loss is defined like one on distributions (:mod:`kdlosses.divergence`): a frozen pydantic
model, whose annotated fields are its hyper-parameters and whose class variables are its traits.
Which layers are compared, the weight, masking, chunks, gradients, and the projection between
different widths are the same for all (:mod:`kdlosses.feature_term`).
"""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from kdlosses.definition import Definition

RESERVED = ("layers", "weight", "tokens")
"""Names in a spec that are not parameters of the loss."""


class HiddenLoss(Definition):
    """Common base class of :class:`FeatureLoss` and :class:`RelationLoss`; derive from one of them.

    Every hyper-parameter has a default, so that a loss can be constructed without arguments. None
    may be called ``layers``, ``weight`` or ``tokens``.

    Attributes:
        equal_widths: both sides must have the same width; otherwise a linear projector, which is
            trained, maps the student's states to the teacher's width.
        zero_at_equality: the value is 0 if the states are equal.
        nonnegative: no value is below 0.
        scale_invariant: multiplying one side by a positive number changes no value.
    """

    equal_widths: ClassVar[bool] = True
    zero_at_equality: ClassVar[bool] = True
    nonnegative: ClassVar[bool] = True
    scale_invariant: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.stateful:
            names = ", ".join(cls.state_names())
            raise TypeError(f"{cls.__name__}: a loss on hidden states has no state ({names})")
        for name in RESERVED:
            if name in cls.model_fields:
                raise TypeError(
                    f"{cls.__name__}.{name}: {', '.join(RESERVED)} are set for every loss on "
                    "hidden states; rename the parameter"
                )


class FeatureLoss(HiddenLoss):
    """A loss that compares two hidden states of one token.

    Define :meth:`row`. Use :class:`RelationLoss` instead if a value depends on other tokens.
    """

    @abstractmethod
    def row(self, teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        """Return one value per token.

        Args:
            teacher_hidden: ``[..., H]``, float32.
            student_hidden: ``[..., H]``, or with ``equal_widths = False`` ``[..., G]``; the
                gradient flows through these.

        Returns:
            ``[...]``; each value depends only on its own row.
        """


class RelationLoss(HiddenLoss):
    """A loss that compares relations between the tokens of one sequence.

    Define :meth:`sequence`. A relation exists only within a sequence, so the evaluation passes one
    sequence at a time, and its memory grows with the number of selected tokens of the longest one:
    with its square, if the relation is one of pairs. Prefer :class:`FeatureLoss` if the value of a
    token depends on its own states alone.
    """

    @abstractmethod
    def sequence(self, teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        """Return one value per token of a sequence.

        Args:
            teacher_hidden: ``[n, H]``, float32, the selected tokens in their order, n >= 1.
            student_hidden: ``[n, H]``, or with ``equal_widths = False`` ``[n, G]``; the gradient
                flows through these.

        Returns:
            ``[n]``. The loss is the mean over all tokens, so a sequence counts by its length.
        """
