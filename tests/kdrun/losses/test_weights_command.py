"""``kdrun weights``, and ``--token-weight`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import kdrun

BUILT_IN = ("advantage_gap", "confidence", "disagreement", "entropy", "position", "top_entropy")


def test_list_and_show() -> None:
    listed = kdrun("weights", "list").stdout
    assert [line.split()[0] for line in listed.splitlines()[1:] if not line.startswith(" ")] == [
        *BUILT_IN
    ]
    shown = kdrun("weights", "show", "top_entropy:share=0.2").stdout
    assert "arXiv:2506.01939" in shown
    assert "share      0.2" in shown
    assert "stateful: True" in shown


def test_check_prints_a_verdict_and_json() -> None:
    assert "disagreement: passed (9 checks)" in kdrun("weights", "check", "disagreement").stdout
    report = json.loads(kdrun("weights", "check", "entropy:power=2", "--json").stdout)
    assert report["verdict"] == "passed"
    assert report["parameters"]["power"] == 2
    assert {check["verdict"] for check in report["checks"]} == {"passed"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--token-weight", "entrpy"), "did you mean 'entropy'"),
        (("--token-weight", "entropy:power=0"), "power='0'"),
        (("--token-weight", "entropy", "--kd-ratio", "0"), "no effect with --kd-ratio 0"),
        (("--set", "token_weight.on=both"), "no effect without token_weight.spec"),
        (("--token-weight", "entropy", "--procedure", "minillm"), "use --procedure gkd"),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = kdrun(*arguments, "--dry-run", "--output", tmp_path / "run")
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
