"""Numbers and verdicts as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdrun.compare.record import Trial
from kdrun.compare.report.content import ArmSummary, Spread, Summary
from kdrun.compare.statistics import LEVEL
from kdrun.compare.verdicts import ArmVerdict
from kdrun.evaluation.yardsticks import Yardstick

_ORDER = ("better", "equivalent", "identical", "undecided", "worse", "diverged", "no verdict")


def places(yardstick: Yardstick) -> int:
    """Number of decimals: one more than the smallest difference of interest has."""
    return max(0, math.ceil(-math.log10(yardstick.difference))) + 1


def number(value: float, yardstick: Yardstick) -> str:
    """A measure, such as ``3.412``."""
    return f"{value:,.{places(yardstick)}f}"


def signed(value: float, yardstick: Yardstick) -> str:
    """A difference with a proper minus sign, such as ``−0.012``; never ``−0.000``."""
    text = f"{value:+.{places(yardstick)}f}"
    return (text if float(text) else text.replace("-", "+")).replace("-", "−")


def spread(found: Spread | None, yardstick: Yardstick) -> str:
    """Mean and standard deviation, such as ``3.412 ± 0.010``; a dash if not measured."""
    if found is None:
        return "–"
    mean = number(found.mean, yardstick)
    if found.deviation is None:
        return mean
    return f"{mean} ± {number(found.deviation, yardstick)}"


def rounded(found: Spread | None) -> str:
    """The mean of tokens per second or MiB; a dash if not measured."""
    return "–" if found is None else f"{found.mean:,.0f}"


def interval(verdict: ArmVerdict) -> str:
    """Mean difference and simultaneous interval, or an empty string."""
    numbers = verdict.comparison
    if numbers is None:
        return ""
    if verdict.verdict == "identical":
        return "0"
    low, high = (signed(end, verdict.yardstick) for end in numbers.interval)
    return f"{signed(numbers.mean, verdict.yardstick)} ({low} to {high})"


def ordered(summary: Summary) -> list[tuple[ArmSummary, ArmVerdict]]:
    """Arms sorted by verdict, best first, then by mean difference."""
    sign = 1 if summary.given.yardstick.lower_is_better else -1

    def place(pair: tuple[ArmSummary, ArmVerdict]) -> tuple[int, float]:
        verdict = pair[1]
        mean = 0.0 if verdict.comparison is None else sign * verdict.comparison.mean
        return _ORDER.index(verdict.verdict), mean

    return sorted(summary.judged, key=place)


def headline(summary: Summary) -> str:
    """The outcome in one sentence."""
    if not summary.judged:
        if any(trial.stage == "tuning" for trial in summary.missing):
            return "No verdict is possible yet: the tuning trials are not finished."
        return "There is nothing to compare: the only arm is the baseline."
    title = f"{summary.given.yardstick.title} of held-out rows"
    named = {
        word: [arm.label for arm, verdict in ordered(summary) if verdict.verdict == word]
        for word in _ORDER
    }
    baseline = summary.arms[0].label
    if named["better"]:
        verb = "is" if len(named["better"]) == 1 else "are"
        return f"{listed(named['better'])} {verb} better than {baseline} on {title}."
    if all(verdict.comparison is None for _, verdict in summary.judged):
        return f"No verdict on {title} is possible{_obstacle(summary)}."
    return f"No arm is shown to be better than {baseline} on {title}."


def _obstacle(summary: Summary) -> str:
    """Why no arm could be tested, permanent reasons first."""
    baseline, *others = (
        any(record.status == "diverged" for record in arm.records) for arm in summary.arms
    )
    if all(others):
        return ": every arm diverged" + ("" if baseline else " except the baseline")
    if baseline:
        return ": the baseline diverged"
    if any(trial.stage == "final" for trial in summary.missing):
        return " yet"
    return "; the table gives the reason for each arm"


def rule(summary: Summary) -> str:
    """A description of the tests, for readers of the page."""
    given = summary.given
    better = "lower" if given.yardstick.lower_is_better else "higher"
    return (
        f"Yardstick: {given.yardstick.title} in {given.yardstick.unit}, {better} is better; "
        f"smallest difference of interest {given.difference:g}. Each trial contributes one "
        "number, its mean over held-out rows; arms are compared with the baseline seed by seed "
        f"(paired t tests, Holm over {len(summary.judged)} arms). The error rate over all arms is "
        f"{LEVEL:.0%} for calling an arm better or worse although it does not differ, and "
        f"{LEVEL:.0%} for calling an arm equivalent although it differs by the smallest difference "
        f"of interest or more. Intervals are simultaneous over all arms ({1 - LEVEL:.0%})."
    )


def warnings(summary: Summary) -> list[str]:
    """Warnings that limit the validity of the verdicts."""
    found = []
    finals = [trial for trial in summary.missing if trial.stage == "final"]
    if summary.missing:
        count = len(summary.missing)
        found.append(
            f"Unfinished: {count} of {count + len(summary.given.records)} trials have not run. "
            + (
                "The verdicts are provisional: their error rate holds for the planned "
                "seeds, not for an intermediate look."
                if finals
                else "They are tuning trials."
            )
        )
    if summary.unwell:
        counts = {
            status: sum(record.status == status for record in summary.unwell)
            for status in ("diverged", "failed")
        }
        parts = [f"{count} {status}" for status, count in counts.items() if count]
        found.append(f"Trials that did not finish: {', '.join(parts)}; listed below.")
    primary = summary.given.yardstick
    wholly, partly = (
        [arm.label for arm in summary.arms if arm.trained_on.get(primary.name) == share]
        for share in ("wholly", "partly")
    )
    if wholly or partly:
        who = [f"{listed(wholly)} (wholly)"] if wholly else []
        if partly:
            every = len(wholly) + len(partly) == len(summary.arms)
            who.append("all other arms (in part)" if every else f"{listed(partly)} (in part)")
        found.append(
            f"Trained on the primary yardstick, {primary.title}: {' and '.join(who)}. "
            "This favours them; consider the other yardsticks too."
        )
    return found


def listed(names: Sequence[str]) -> str:
    """``a, b and c``; with semicolons if a name contains a comma."""
    comma = "; " if any("," in name for name in names) else ", "
    *others, last = names
    return f"{comma.join(others)} and {last}" if others else last


def trial_name(trial: Trial, summary: Summary) -> str:
    """The name of a trial."""
    stage = "" if trial.stage == "final" else ", tuning"
    return f"{summary.labels[trial.arm]}, seed {trial.seed}{stage}"
