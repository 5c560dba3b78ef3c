"""What is read out of a loss: the parts of its docstring, its bounds, its traits."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kdlosses import Divergence, get_loss
from kdrun.losses.describe import Parameter, doc_parts, parameters, traits


class Example(Divergence):
    """Example divergence, sum (p - q)^2 with, say, two
    lines.

    Does this,
    and that.

    Not for something.

    Also this.

    Reference: Someone 2020,
    arXiv:2001.00001.
    """

    temperature_power = 1

    low: float = Field(0.5, ge=0, lt=1.5, description="a number")
    flag: bool = Field(True, description="a switch")

    def integrand(self, teacher_log_probs: Any, student_log_probs: Any) -> Any:
        return (teacher_log_probs.exp() - student_log_probs.exp()) ** 2


class Bare(Divergence):
    def integrand(self, teacher_log_probs: Any, student_log_probs: Any) -> Any:
        return teacher_log_probs


def test_a_docstring_is_taken_apart() -> None:
    parts = doc_parts(Example())
    assert parts.title == "Example divergence"
    assert parts.formula == "sum (p - q)^2 with, say, two lines"
    assert parts.about == ["Does this, and that.", "Also this."]
    assert parts.limits == ["Not for something."]
    assert parts.reference == "Someone 2020, arXiv:2001.00001."


def test_a_loss_without_a_docstring_has_empty_parts() -> None:
    parts = doc_parts(Bare())
    assert (parts.title, parts.formula, parts.about, parts.reference) == ("", "", [], "")
    assert parameters(Bare()) == []


def test_bounds_are_written_as_relations() -> None:
    assert parameters(Example(low=0.25)) == [
        Parameter("low", "0.25", ">= 0, < 1.5", "a number"),
        Parameter("flag", "True", "-", "a switch"),
    ]


def test_traits_hold_what_the_kind_of_loss_has() -> None:
    found = traits(Example())
    assert found["temperature_power"] == 1
    assert found["reduction"] == "sum"
    assert found["curvature"] is None
    assert "reduction" not in traits(get_loss("adaptive_kl").loss)
    assert traits(get_loss("hellinger").loss)["curvature"] == 0.25
