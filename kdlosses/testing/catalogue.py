"""The named checks of each kind of definition, and the definitions to which they apply."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from kdlosses.definition import Definition
from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.registry import get_loss
from kdlosses.testing.verdicts import (
    About,
    CheckResult,
    demand,
    describe,
    parametrized,
    verdicts_of,
)

D = TypeVar("D", bound=Definition)
LossLike = str | Loss | type[Loss]


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        name: name in ``expected_failures`` and reports.
        description: the requirement, in one line.
        function: raises if a definition fails.
        about: whether it checks the mathematics of a definition or its documentation.
        convert: returns the definition of a spec, a class or an instance.
    """

    name: str
    description: str
    function: Callable[[Any], None]
    about: About
    convert: Callable[[Any], Definition]

    def __call__(self, given: Any) -> None:
        """Check a definition, given by a spec, a class or an instance.

        Raises:
            AssertionError: it fails; any other exception is also a failure.
        """
        with torch.enable_grad():
            self.function(self.convert(given))


class Catalogue(Generic[D]):
    """All checks of one kind of definition.

    Args:
        what: the kind, as reports name it.
        convert: returns the definition of a spec, a class or an instance.
        version: raised when a check is added or demands more.

    Attributes:
        checks: by name, with the definitions to which they apply.
    """

    def __init__(self, what: str, convert: Callable[[Any], D], version: int) -> None:
        self._what, self._convert, self._version = what, convert, version
        self.checks: dict[str, tuple[Check, Callable[[D], bool]]] = {}
        self.conformance()(self._expected_failures)

    def conformance(
        self, applies: Callable[[D], bool] = lambda given: True, about: About = "mathematics"
    ) -> Callable[[Callable[[D], None]], Callable[[D], None]]:
        """Register a function as a check, named like the function without underscores."""

        def register(function: Callable[[D], None]) -> Callable[[D], None]:
            name = function.__name__.lstrip("_")
            description = inspect.getdoc(function) or ""
            check = Check(name, description, function, about, self._convert)
            self.checks[name] = (check, applies)
            return function

        return register

    def checks_for(self, given: Any) -> Iterator[Check]:
        """The checks that apply to a definition, given its traits."""
        definition = self._convert(given)
        return (check for check, applies in self.checks.values() if applies(definition))

    def run(self, given: Any) -> list[CheckResult]:
        """Run all checks and record failures instead of raising them."""
        definition = self._convert(given)
        return verdicts_of(self.checks_for(definition), definition)

    def report(self, given: Any) -> dict[str, Any]:
        """Run all checks and describe the result, in a form that JSON can hold."""
        definition = self._convert(given)
        return describe(self._what, definition, self.run(definition), self._version)

    def demand(self, given: Any) -> None:
        """Run all checks.

        Raises:
            ConformanceError: contains the names and reasons of the failed checks.
        """
        definition = self._convert(given)
        demand(definition, self.run(definition))

    def parametrize(self, argument: str, given: Iterable[Any]) -> Any:
        """A pytest decorator that creates one test for each definition and check.

        Args:
            argument: name of the test's first argument; the second is ``check``.
            given: specs, classes or instances.
        """
        return parametrized(
            argument, [(each, self._convert(each)) for each in given], self.checks_for
        )

    def _expected_failures(self, definition: D) -> None:
        """Declared failures are names of existing checks with a reason."""
        for name, reason in definition.expected_failures.items():
            if name not in self.checks:
                raise AssertionError(
                    f"there is no check {name!r}; the checks are {', '.join(self.checks)}"
                )
            if not reason.strip():
                raise AssertionError(f"{name} has no reason")


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


CONFORMANCE_VERSION = 1
"""Raised when a check is added or demands more, so that a verdict says what was checked."""

LOSSES: Catalogue[Loss] = Catalogue("loss", as_loss, CONFORMANCE_VERSION)
"""The checks of losses; filled by the other modules."""

CHECKS = LOSSES.checks
conformance = LOSSES.conformance
