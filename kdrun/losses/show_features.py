"""The output of ``kdrun features list``, ``show`` and ``check``."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from kdlosses import (
    BrokenFeatureError,
    FeatureSpecError,
    available_features,
    build_feature,
    feature_files,
    find_feature,
    ignored_features,
    parse_features,
)
from kdrun.losses.describe import doc_parts, parameters
from kdrun.losses.features import features_as_input
from kdrun.losses.show import IGNORED, plain_console, print_parameters, print_refs

if TYPE_CHECKING:
    from kdlosses import FeatureRef, HiddenLoss

_TRAITS = (
    "equal_widths",
    "zero_at_equality",
    "nonnegative",
    "scale_invariant",
    "expected_failures",
)
_UNUSABLE = (BrokenFeatureError, FeatureSpecError)


def print_features(details: bool) -> None:
    """Print one row per loss; with ``details``, import each and report broken ones."""
    console = plain_console()
    if details:
        for ref in available_features():
            for line in _details(ref):
                console.print(line, markup=False)
        return
    print_refs(available_features(), ignored_features())


def print_feature(spec: str) -> None:
    """Print formula, parameters and traits of a loss.

    Args:
        spec: its name, with or without parameters.

    Raises:
        InputError: an unknown loss, or one that cannot be imported.
    """
    console = plain_console()
    with features_as_input():
        loss = build_feature(spec)
        ref = find_feature(parse_features(spec).name)
        files = feature_files(spec)
    console.print(inspect.cleandoc(type(loss).__doc__ or "(no docstring)"), markup=False)
    console.print()
    print_parameters(console, parameters(loss))
    console.print(f"kind: {_kind(loss)}")
    for name in _TRAITS:
        console.print(f"{name}: {getattr(loss, name)}", markup=False)
    for file, digest in files.items():
        console.print(f"from the file {file}, SHA-256 {digest}", markup=False)
    if not files:
        console.print(f"registered by {ref.distribution} as {ref.name}")


def check_features(spec: str) -> bool:
    """Run the conformance checks of a loss and print a row for each.

    Returns:
        Whether all checks passed.

    Raises:
        InputError: an unknown loss, or one that cannot be imported.
    """
    from kdlosses import testing
    from kdrun.losses.check import print_results

    with features_as_input():
        return print_results(spec, testing.run_feature_checks(build_feature(spec)))


def check_all_features() -> bool:
    """Run the checks of every registered loss; print a line per loss, and its failures.

    Returns:
        Whether all checks passed. A loss that cannot be used counts as failed.
    """
    from kdlosses import testing
    from kdrun.losses.check import print_all

    names = sorted({ref.name for ref in available_features()})
    return print_all(names, testing.run_feature_checks, _UNUSABLE, "losses on hidden states")


def print_features_json(spec: str | None) -> bool:
    """Run the checks of one loss, or of every registered one, and print the verdicts as JSON.

    Returns:
        Whether all checks passed.

    Raises:
        InputError: an unknown loss, or one that cannot be imported.
    """
    if spec is not None:
        with features_as_input():
            found = _report(spec)
        print(json.dumps(found, indent=1))
        return bool(found["verdict"] == "passed")
    reports = []
    for name in sorted({ref.name for ref in available_features()}):
        try:
            reports.append(_report(name))
        except _UNUSABLE as error:
            reports.append({"spec": name, "verdict": "broken", "reason": str(error)})
    print(json.dumps(reports, indent=1))
    return all(report["verdict"] == "passed" for report in reports)


def _report(spec: str) -> dict[str, Any]:
    from kdlosses import testing

    report = testing.report_feature_checks(build_feature(spec))
    return {"spec": spec, "files": feature_files(spec), **report}


def _kind(loss: HiddenLoss) -> str:
    from kdlosses import RelationLoss

    return "relation between tokens" if isinstance(loss, RelationLoss) else "each token"


def _details(ref: FeatureRef) -> list[str]:
    heading = [ref.name, ref.distribution]
    if ref in ignored_features():
        return ["  ".join([*heading, IGNORED])]
    try:
        loss = build_feature(ref.name)
    except _UNUSABLE as error:
        return ["  ".join([*heading, "broken"]), f"    {error}"]
    heading += [_kind(loss), ", ".join(f"{k}={v}" for k, v in loss.model_dump().items())]
    parts = doc_parts(loss)
    more = [parts.formula or parts.title, parts.reference]
    return ["  ".join(heading).rstrip(), *(f"    {line}" for line in more)]
