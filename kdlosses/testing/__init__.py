"""Conformance checks of losses, selected by their traits, for built-in losses and plugins.

``check_loss("forward_kl")`` runs all checks; ``parametrize_with_checks`` turns them into tests of a
plugin. The checks use relations and finite differences, so they need no reference values.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from kdlosses.definition import Definition
from kdlosses.testing import (  # noqa: F401 - imports fill the catalogue
    batches,
    extremes,
    form,
    gradients,
    moving,
    teachers,
    values,
)
from kdlosses.testing.catalogue import CHECKS, About, Check, LossLike, as_loss
from kdlosses.testing.token_weights import WEIGHT_CHECKS
from kdlosses.token_weight import TokenWeight
from kdlosses.weights import get_weight

__all__ = [
    "CONFORMANCE_VERSION",
    "Check",
    "CheckResult",
    "ConformanceError",
    "check_loss",
    "check_weight",
    "checks_for",
    "parametrize_with_checks",
    "report_checks",
    "run_checks",
    "run_weight_checks",
]

CONFORMANCE_VERSION = 1
"""Raised when a check is added or demands more, so that a verdict says what was checked."""

WeightLike = str | TokenWeight | type[TokenWeight]
Verdict = Literal["passed", "failed", "expected failure"]


class ConformanceError(AssertionError):
    """A loss fails checks; the message contains their names and reasons."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        name: name of the check.
        verdict: ``"passed"``, ``"failed"``, or ``"expected failure"`` if the loss declares it.
        reason: why it failed, or the reason declared by the loss; empty if it passed.
        about: subject of the check, ``"mathematics"`` or ``"documentation"``.
    """

    name: str
    verdict: Verdict
    reason: str
    about: About = "mathematics"


def checks_for(loss: LossLike) -> Iterator[Check]:
    """The checks that apply to a loss, given its traits.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.
    """
    loss = as_loss(loss)
    for check, applies in CHECKS.values():
        if applies(loss):
            yield check


def run_checks(loss: LossLike) -> list[CheckResult]:
    """Run all checks of a loss and record failures instead of raising them.

    A declared failure that passes counts as failed, because its declaration is out of date.
    """
    loss = as_loss(loss)
    results = []
    for check in checks_for(loss):
        reason = _reason(check, loss)
        declared = loss.expected_failures.get(check.name)
        if declared is None:
            result = CheckResult(
                check.name, "failed" if reason else "passed", reason or "", check.about
            )
        elif reason:
            result = CheckResult(check.name, "expected failure", declared, check.about)
        else:
            result = CheckResult(
                check.name, "failed", f"passes, although declared to fail: {declared}", check.about
            )
        results.append(result)
    return results


def report_checks(loss: LossLike) -> dict[str, Any]:
    """Run all checks of a loss and describe the result, in a form that JSON can hold.

    Returns:
        ``conformance_version`` and ``kdlosses`` (its version); ``loss``, its class, and its
        ``parameters``; ``verdict``, ``"passed"`` or ``"failed"``; ``counts`` of the verdicts of the
        checks; and ``checks``, a list of objects with the fields of :class:`CheckResult`.
    """
    loss = as_loss(loss)
    results = run_checks(loss)
    verdicts = [result.verdict for result in results]
    kinds: tuple[Verdict, ...] = ("passed", "failed", "expected failure")
    kind = type(loss)
    return {
        "conformance_version": CONFORMANCE_VERSION,
        "kdlosses": _installed_version(),
        "loss": f"{kind.__module__}:{kind.__qualname__}",
        "parameters": loss.model_dump(mode="json"),
        "verdict": "failed" if "failed" in verdicts else "passed",
        "counts": {name: verdicts.count(name) for name in kinds},
        "checks": [asdict(result) for result in results],
    }


def check_loss(loss: LossLike) -> None:
    """Run all checks of a loss.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    loss = as_loss(loss)
    _raise_failed(repr(loss), run_checks(loss))


def run_weight_checks(weight: WeightLike) -> list[CheckResult]:
    """Run all checks of a token weight and record failures instead of raising them.

    Args:
        weight: a spec such as ``"disagreement:power=0.5"``, a class, or an instance.
    """
    weight = _as_weight(weight)
    results = []
    for name, check in WEIGHT_CHECKS.items():
        reason = _reason(check, weight)
        about: About = "documentation" if name == "documentation" else "mathematics"
        results.append(CheckResult(name, "failed" if reason else "passed", reason or "", about))
    return results


def check_weight(weight: WeightLike) -> None:
    """Run all checks of a token weight; argument as in :func:`run_weight_checks`.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    weight = _as_weight(weight)
    _raise_failed(repr(weight), run_weight_checks(weight))


def parametrize_with_checks(losses: Iterable[LossLike]) -> Any:
    """A pytest decorator that creates one test for each loss and check.

    The test takes ``loss`` and ``check`` and calls ``check(loss)``. Declared failures become
    strict ``xfail`` marks with their reasons.
    """
    pytest = import_module("pytest")  # only needed for writing tests
    cases = []
    for given in losses:
        loss = as_loss(given)
        label = given.__name__ if isinstance(given, type) else f"{given!r}".strip("'")
        for check in checks_for(loss):
            reason = loss.expected_failures.get(check.name)
            marks = () if reason is None else pytest.mark.xfail(reason=reason, strict=True)
            cases.append(pytest.param(loss, check, marks=marks, id=f"{label}-{check.name}"))
    return pytest.mark.parametrize(("loss", "check"), cases)


def _installed_version() -> str | None:
    try:
        return version("kdlosses")
    except PackageNotFoundError:  # a checkout that is not installed
        return None


def _as_weight(weight: WeightLike) -> TokenWeight:
    if isinstance(weight, str):
        return get_weight(weight)
    found = weight() if isinstance(weight, type) else weight
    if not isinstance(found, TokenWeight):
        raise TypeError(f"expected a token weight or the name of one, got {weight!r}")
    return found


def _raise_failed(what: str, results: list[CheckResult]) -> None:
    failed = [result for result in results if result.verdict == "failed"]
    if failed:
        lines = [f"  {result.name}: {result.reason}" for result in failed]
        heading = f"{what} fails {len(failed)} of {len(results)} checks:"
        raise ConformanceError("\n".join([heading, *lines]))


def _reason(check: Callable[[Any], None], definition: Definition) -> str | None:
    """Why a check fails; None if it passes."""
    try:
        check(definition)
    except AssertionError as error:
        return str(error) or "an assertion failed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
