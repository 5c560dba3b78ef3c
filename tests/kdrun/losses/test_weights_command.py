"""``kdrun weights``, and ``--token-weight`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import kdrun

from kdrun.errors import InputError

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


SURPRISE = """
from kdlosses import TokenWeight


class Surprise(TokenWeight):
    \"\"\"The surprise at the label, w = min(-log q_y, 5) / 5.

    Reference: none.
    \"\"\"

    def weigh(self, teacher_log_probs, student_log_probs, labels):
        label = student_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (-label / 5).clamp(0, 1)
"""


def test_a_weight_of_a_file_is_checked_shown_and_recorded(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SURPRISE, encoding="utf-8")
    spec = f"{file}:Surprise"
    assert "passed (8 checks)" in kdrun("weights", "check", spec).stdout
    assert f"from the file {file}, SHA-256" in kdrun("weights", "show", spec).stdout
    assert "has no class 'Surprize'" in kdrun("weights", "check", f"{file}:Surprize").stderr
    folder = distil(tmp_path / "run", token_weight__spec=spec)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert 0 < json.loads(lines[1])["token_weight"] <= 1
    file.write_text(SURPRISE.replace("5", "4"), encoding="utf-8")
    with pytest.raises(InputError, match=r"mine.py was changed after the run began"):
        distil(folder, resume=True, training__max_steps=4, token_weight__spec=spec)
