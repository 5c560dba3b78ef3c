"""Comparisons of losses from files: a changed file is another loss."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import QUICK, compare, records, refused

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)

TEXT = '''
from pydantic import Field
from kdlosses import Divergence


class Squares(Divergence):
    """Squared distance, sum w (p - q)^2 with w = weight.

    Reference: none.
    """

    weight: float = Field(1.0, gt=0, description="the factor")

    def integrand(self, teacher_log_probs, student_log_probs):
        return self.weight * (teacher_log_probs.exp() - student_log_probs.exp()) ** 2
'''


def test_the_file_is_recorded_and_a_changed_one_is_refused(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first.py", "second.py"):
        Path(name).write_text(TEXT, encoding="utf-8")
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    pair = ("--teacher", tiny_pair.teacher, "--student", tiny_pair.student)
    given = (*pair, "--data", tiny_pair.rows, "--set", "evaluation.answers=0", "--output", "c")
    losses = ("--loss", "first.py:Squares_chunked", "--loss", "second.py:Squares_chunked:weight=2")
    said = compare(*given, *losses, "--seeds", 1)
    assert "first.py:Squares_chunked" in said
    declared = yaml.safe_load(Path("c/comparison.yaml").read_text(encoding="utf-8"))
    assert declared["loss_files"] == {"first.py": digest, "second.py": digest}
    found = {
        record["trial"]["arm"]["loss"]: record["loss_files"]
        for record in records(Path("c")).values()
    }
    assert found["second.py:Squares_chunked:weight=2"] == {"second.py": digest}
    Path("second.py").write_text(TEXT + "# edited\n", encoding="utf-8")
    line = refused("compare-losses", *QUICK, *given, *losses, "--seeds", 2)
    assert line == (
        "--output c: second.py was changed after the first trial, so its loss is another one; "
        "restore the file, save the new one under another name and add it with --loss, or choose "
        "another folder"
    )
    # What does not name the file goes on.
    compare(*given, *losses[:2], "--seeds", 2)
