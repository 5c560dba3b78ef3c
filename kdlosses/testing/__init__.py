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
from kdlosses.testing.catalogue import CHECKS, Check, LossLike, as_loss
from kdlosses.testing.features import (
    FEATURE_CONFORMANCE_VERSION,
    FeatureCheck,
    check_feature,
    feature_checks_for,
    parametrize_with_feature_checks,
    report_feature_checks,
    run_feature_checks,
)
from kdlosses.testing.token_weights import (
    WEIGHT_CONFORMANCE_VERSION,
    WeightCheck,
    check_weight,
    parametrize_with_weight_checks,
    report_weight_checks,
    run_weight_checks,
)
from kdlosses.testing.verdicts import (
    CheckResult,
    ConformanceError,
    demand,
    describe,
    parametrized,
    verdicts_of,
)

__all__ = [
    "CONFORMANCE_VERSION",
    "FEATURE_CONFORMANCE_VERSION",
    "WEIGHT_CONFORMANCE_VERSION",
    "Check",
    "CheckResult",
    "ConformanceError",
    "FeatureCheck",
    "WeightCheck",
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

CONFORMANCE_VERSION = 1
"""Raised when a check is added or demands more, so that a verdict says what was checked."""


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
    return verdicts_of(checks_for(loss), loss)


def report_checks(loss: LossLike) -> dict[str, Any]:
    """Run all checks of a loss and describe the result, in a form that JSON can hold.

    Returns:
        ``conformance_version`` and ``kdlosses`` (its version); ``loss``, its class, and its
        ``parameters``; ``verdict``, ``"passed"`` or ``"failed"``; ``counts`` of the verdicts of the
        checks; and ``checks``, a list of objects with the fields of :class:`CheckResult`.
    """
    loss = as_loss(loss)
    return describe("loss", loss, run_checks(loss), CONFORMANCE_VERSION)


def check_loss(loss: LossLike) -> None:
    """Run all checks of a loss.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    loss = as_loss(loss)
    demand(loss, run_checks(loss))


def parametrize_with_checks(losses: Iterable[LossLike]) -> Any:
    """A pytest decorator that creates one test for each loss and check.

    The test takes ``loss`` and ``check`` and calls ``check(loss)``. Declared failures become
    strict ``xfail`` marks with their reasons.
    """
    return parametrized("loss", [(given, as_loss(given)) for given in losses], checks_for)
