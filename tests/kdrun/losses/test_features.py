"""``kdrun features``: list, show, check, and the package that ``new`` writes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdlosses.testing import check_feature
from kdrun.cli import cli
from kdrun.errors import InputError


def features(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["features", *arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.output


def test_list_and_show() -> None:
    names = [line.split()[:2] for line in features("list").splitlines()[1:]]
    assert ["hidden_cosine", "kdlosses"] in names
    assert "arXiv:1907.09682" in features("list", "--details")
    shown = features("show", "hidden_mse:scale=teacher")
    assert "sum_i (t_i / rms(t) - s_i / r)^2 / H" in shown
    assert any(line.split()[:2] == ["scale", "teacher"] for line in shown.splitlines())
    assert "registered by kdlosses as hidden_mse" in shown


def test_check_tells_a_verdict_and_exits_with_1_for_a_wrong_loss(tmp_path: Path) -> None:
    assert "hidden_cosine: passed" in features("check", "hidden_cosine")
    assert "3 of 3 losses on hidden states pass" in features("check", "--all")
    file = tmp_path / "wrong.py"
    file.write_text(
        "from kdlosses import FeatureLoss\n\n\n"
        "class Wrong(FeatureLoss):\n"
        '    """Wrong, sum t s.\n\n    Reference: none.\n    """\n\n'
        "    def row(self, teacher_hidden, student_hidden):\n"
        "        return (teacher_hidden * student_hidden).sum(-1)\n",
        encoding="utf-8",
    )
    verdict = json.loads(features("check", f"{file}:Wrong", "--json", code=1))
    assert verdict["verdict"] == "failed"
    failed = {check["name"] for check in verdict["checks"] if check["verdict"] == "failed"}
    assert failed == {"zero_at_equality", "nonnegative"}
    with pytest.raises(InputError, match="did you mean 'hidden_mse'"):
        features("check", "hidden_mze")


def test_new_writes_a_loss_that_conforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package"
    said = features("new", "smooth_state", "--output", str(folder))
    assert said.startswith(str(folder))
    project = (folder / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points."kdlosses.features"]' in project
    assert 'smooth_state = "kdlosses_smooth_state:SmoothStateFeatures"' in project
    monkeypatch.syspath_prepend(str(folder / "src"))
    module = importlib.import_module("kdlosses_smooth_state")
    check_feature(module.SmoothStateFeatures)
    with pytest.raises(InputError, match="already exists"):
        features("new", "smooth_state", "--output", str(folder))
    with pytest.raises(InputError, match="already registered by kdlosses"):
        features("new", "hidden_mse")
    with pytest.raises(InputError, match="lower-case letters"):
        features("new", "Smooth-State")
