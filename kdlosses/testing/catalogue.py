"""The named checks, and the losses to which they apply."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.registry import get_loss

About = Literal["mathematics", "documentation"]
LossLike = str | Loss | type[Loss]


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        name: name in ``expected_failures`` and reports.
        description: the requirement, in one line.
        function: raises if a loss fails.
        about: whether it checks the mathematics of a loss or its documentation.
    """

    name: str
    description: str
    function: Callable[[Loss], None]
    about: About = "mathematics"

    def __call__(self, loss: LossLike) -> None:
        """Check a loss.

        Raises:
            AssertionError: the loss fails; any other exception is also a failure.
        """
        with torch.enable_grad():
            self.function(as_loss(loss))


CHECKS: dict[str, tuple[Check, Callable[[Loss], bool]]] = {}
"""All checks by name, with the losses to which they apply; filled by the other modules."""


def conformance(
    applies: Callable[[Loss], bool] = lambda loss: True,
    about: About = "mathematics",
) -> Callable[[Callable[[Loss], None]], Callable[[Loss], None]]:
    """Register a function as a check, named like the function without underscores."""

    def register(function: Callable[[Loss], None]) -> Callable[[Loss], None]:
        name = function.__name__.lstrip("_")
        CHECKS[name] = (Check(name, inspect.getdoc(function) or "", function, about), applies)
        return function

    return register


def as_loss(loss: LossLike) -> Loss:
    """The loss given by a spec, a class or an instance.

    Raises:
        TypeError: none of the three.
    """
    if isinstance(loss, str):
        return get_loss(loss).loss
    if isinstance(loss, type) and issubclass(loss, Loss):
        loss = loss()
    if not isinstance(loss, Divergence | RowLoss):
        raise TypeError(f"expected a loss or the name of one, got {loss!r}")
    return loss
