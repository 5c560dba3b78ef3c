"""Conformance checks of losses, selected by their traits, for built-in losses and plugins.

``check_loss("forward_kl")`` runs all checks; ``parametrize_with_checks`` turns them into tests of a
plugin. The checks use relations and finite differences, so they need no reference values.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from kdlosses.testing import (  # noqa: F401 - imports fill the catalogue
    batches,
    extremes,
    form,
    gradients,
    moving,
    teachers,
    values,
)
from kdlosses.testing.catalogue import CONFORMANCE_VERSION, LOSSES, Check, LossLike
from kdlosses.testing.features import (
    FEATURE_CONFORMANCE_VERSION,
    check_feature,
    feature_checks_for,
    parametrize_with_feature_checks,
    report_feature_checks,
    run_feature_checks,
)
from kdlosses.testing.token_weights import (
    WEIGHT_CONFORMANCE_VERSION,
    check_weight,
    parametrize_with_weight_checks,
    report_weight_checks,
    run_weight_checks,
)
from kdlosses.testing.verdicts import CheckResult, ConformanceError

__all__ = [
    "CONFORMANCE_VERSION",
    "FEATURE_CONFORMANCE_VERSION",
    "WEIGHT_CONFORMANCE_VERSION",
    "Check",
    "CheckResult",
    "ConformanceError",
    "check_feature",
    "check_loss",
    "check_weight",
    "checks_for",
    "feature_checks_for",
    "parametrize_with_checks",
    "parametrize_with_feature_checks",
    "parametrize_with_weight_checks",
    "report_checks",
    "report_feature_checks",
    "report_weight_checks",
    "run_checks",
    "run_feature_checks",
    "run_weight_checks",
]


def checks_for(loss: LossLike) -> Iterator[Check]:
    """The checks that apply to a loss, given its traits.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.
    """
    return LOSSES.checks_for(loss)


def run_checks(loss: LossLike) -> list[CheckResult]:
    """Run all checks of a loss and record failures instead of raising them.

    A declared failure that passes counts as failed, because its declaration is out of date.
    """
    return LOSSES.run(loss)


def report_checks(loss: LossLike) -> dict[str, Any]:
    """Run all checks of a loss and describe the result, in a form that JSON can hold.

    Returns:
        ``conformance_version`` and ``kdlosses`` (its version); ``loss``, its class, and its
        ``parameters``; ``verdict``, ``"passed"`` or ``"failed"``; ``counts`` of the verdicts of the
        checks; and ``checks``, a list of objects with the fields of :class:`CheckResult`.
    """
    return LOSSES.report(loss)


def check_loss(loss: LossLike) -> None:
    """Run all checks of a loss.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    LOSSES.demand(loss)


def parametrize_with_checks(losses: Iterable[LossLike]) -> Any:
    """A pytest decorator that creates one test for each loss and check.

    The test takes ``loss`` and ``check`` and calls ``check(loss)``. Declared failures become
    strict ``xfail`` marks with their reasons.
    """
    return LOSSES.parametrize("loss", losses)
