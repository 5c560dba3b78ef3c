"""``kdrun losses check`` tells a missing description from a wrong gradient."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kdlosses import Divergence
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
