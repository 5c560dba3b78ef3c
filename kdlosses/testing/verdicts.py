"""The results of checks: verdicts, reports, and tests, for every kind of plugin."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

About = Literal["mathematics", "documentation"]
Verdict = Literal["passed", "failed", "expected failure"]


class ConformanceError(AssertionError):
    """A plugin fails checks; the message contains their names and reasons."""


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


def verdicts_of(checks: Iterable[Any], checked: Any) -> list[CheckResult]:
    """Run checks and record failures instead of raising them.

    Args:
        checks: with a ``name`` and a subject ``about``; called with what they check.
        checked: declares failures by name in ``expected_failures``. A declared failure that passes
            counts as failed, because its declaration is out of date.
    """
    results = []
    for check in checks:
        reason = _failure(check, checked)
        declared = checked.expected_failures.get(check.name)
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


def describe(
    what: str, checked: Any, results: list[CheckResult], conformance_version: int
) -> dict[str, Any]:
    """Describe results in a form that JSON can hold.

    Args:
        what: key of the class in the result.
        checked: the plugin, a pydantic model.
        results: from :func:`verdicts_of`.
        conformance_version: the version of the checks.
    """
    verdicts = [result.verdict for result in results]
    kinds: tuple[Verdict, ...] = ("passed", "failed", "expected failure")
    kind = type(checked)
    return {
        "conformance_version": conformance_version,
        "kdlosses": _installed_version(),
        what: f"{kind.__module__}:{kind.__qualname__}",
        "parameters": checked.model_dump(mode="json"),
        "verdict": "failed" if "failed" in verdicts else "passed",
        "counts": {name: verdicts.count(name) for name in kinds},
        "checks": [asdict(result) for result in results],
    }


def demand(checked: Any, results: list[CheckResult]) -> None:
    """Raise if a check failed.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    failed = [result for result in results if result.verdict == "failed"]
    if failed:
        lines = [f"  {result.name}: {result.reason}" for result in failed]
        heading = f"{checked!r} fails {len(failed)} of {len(results)} checks:"
        raise ConformanceError("\n".join([heading, *lines]))


def parametrized(
    what: str, checked: Iterable[tuple[Any, Any]], checks_for: Callable[[Any], Iterable[Any]]
) -> Any:
    """A pytest decorator that creates one test for each plugin and check.

    Args:
        what: name of the test's first argument; the second is ``check``.
        checked: what was given, for labels, and the plugin.
        checks_for: the checks of a plugin.
    """
    pytest = import_module("pytest")  # only needed for writing tests
    cases = []
    for given, plugin in checked:
        label = given.__name__ if isinstance(given, type) else f"{given!r}".strip("'")
        for check in checks_for(plugin):
            reason = plugin.expected_failures.get(check.name)
            marks = () if reason is None else pytest.mark.xfail(reason=reason, strict=True)
            cases.append(pytest.param(plugin, check, marks=marks, id=f"{label}-{check.name}"))
    return pytest.mark.parametrize((what, "check"), cases)


def _installed_version() -> str | None:
    try:
        return version("kdlosses")
    except PackageNotFoundError:  # a checkout that is not installed
        return None


def _failure(check: Any, checked: Any) -> str | None:
    try:
        check(checked)
    except AssertionError as error:
        return str(error) or "an assertion failed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
