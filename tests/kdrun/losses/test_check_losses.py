"""``kdrun losses check`` tells a missing description from a wrong gradient."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdlosses import Divergence, LossRef, testing
from kdrun.cli import cli
from kdrun.losses import check


class Undescribed(Divergence):
    """Half of the squared distance, sum (p - q)^2 / 2."""  # no reference

    def integrand(self, teacher_log_probs, student_log_probs):  # type: ignore[no-untyped-def]
        """The right terms."""
        return (teacher_log_probs.exp() - student_log_probs.exp()) ** 2 / 2


class Wrong(Undescribed):
    """Half of the distance, sum (p - q) / 2."""

    def integrand(self, teacher_log_probs, student_log_probs):  # type: ignore[no-untyped-def]
        """Terms that can be negative."""
        return (teacher_log_probs.exp() - student_log_probs.exp()) / 2


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [
        (Undescribed, "the mathematics passed, the documentation failed (1 of "),
        (Wrong, "failed ("),
    ],
)
def test_documentation_is_reported_apart_from_mathematics(
    monkeypatch: pytest.MonkeyPatch, loss: type[Divergence], verdict: str
) -> None:
    monkeypatch.setattr(check, "single_loss", lambda spec: loss())
    done = CliRunner().invoke(cli, ["losses", "check", "mine"], catch_exceptions=False)
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[-1].startswith(f"mine: {verdict}")
    (docstring,) = [line for line in lines if line.startswith("docstring (documentation)")]
    assert "failed" in docstring
    assert "Reference" in docstring
    assert lines.index(docstring) == len(lines) - 3  # after all others


def test_the_verdict_is_readable_by_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(cli, ["losses", "check", "forward_kl", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.output)
    assert found["spec"] == "forward_kl"
    assert found["verdict"] == "passed"
    assert found["conformance_version"] == testing.CONFORMANCE_VERSION
    assert found["kdlosses"] == version("kdlosses")
    assert found["files"] == {}
    names = [check["name"] for check in found["checks"]]
    assert names == [check.name for check in testing.checks_for("forward_kl")]
    assert found["counts"] == {"passed": len(names), "failed": 0, "expected failure": 0}
    monkeypatch.setattr(check, "single_loss", lambda spec: Wrong())
    done = CliRunner().invoke(cli, ["losses", "check", "hellinger", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.output)
    assert found["verdict"] == "failed"
    failed = [each for each in found["checks"] if each["verdict"] == "failed"]
    assert len(failed) == found["counts"]["failed"] > 0
    assert all(each["reason"] for each in failed)


def test_all_verdicts_include_losses_that_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    refs = [LossRef("hellinger", "kdlosses", ""), LossRef("no_such_loss", "mine", "")]
    monkeypatch.setattr(check, "available_losses", lambda: tuple(refs))
    done = CliRunner().invoke(cli, ["losses", "check", "--all", "--json"])
    assert done.exit_code == 1
    good, broken = json.loads(done.output)
    assert good["verdict"] == "passed"
    assert broken["verdict"] == "broken"
    assert "no_such_loss" in broken["reason"]


def test_a_class_of_a_file_is_checked_with_its_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "from kdlosses.losses.hellinger import Hellinger\n\n\n"
        "class Mine(Hellinger):\n"
        '    """Half of the distance, sum (p - q) / 2.\n\n    Reference: none.\n    """\n'
    )
    Path("mine.py").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(cli, ["losses", "check", "mine.py:Mine", "--json"])
    assert done.exit_code == 0
    files = {"mine.py": hashlib.sha256(text.encode()).hexdigest()}
    assert json.loads(done.output)["files"] == files
    shown = CliRunner().invoke(cli, ["losses", "show", "mine.py:Mine"])
    assert f"from the file mine.py, SHA-256 {files['mine.py']}" in shown.output
