"""``kdrun features new``: create a package with one loss on hidden states and its tests."""

from __future__ import annotations

from pathlib import Path
from string import Template

from kdlosses import available_features
from kdrun.losses.new import Kind, new_words, write_package

_MODULE = '''\
"""The loss on hidden states $name: replace the example with your own formula."""

from kdlosses import FeatureLoss
from pydantic import Field
from torch import Tensor


class $class_name(FeatureLoss):
    """Smooth distance of states, sum_i (sqrt(1 + (t_i - s_i)^2 / d^2) - 1) d^2 / H with d = knee.

    t is the teacher's state of a token, s the student's, H the width. Quadratic below the knee and
    linear above it, so that a few dimensions with large values do not determine the gradient.

    Not recommended between layers whose states have very different scales: the knee is absolute.

    Reference: Barron 2019, arXiv:1701.03077 (alpha = 1).
    """

    knee: float = Field(1.0, gt=0, description="difference above which the loss becomes linear")

    def row(self, teacher_hidden: Tensor, student_hidden: Tensor) -> Tensor:
        """Return one value per token, from states [..., H] of the same width."""
        square = ((teacher_hidden - student_hidden) / self.knee).square()
        return (square / ((1 + square).sqrt() + 1)).mean(-1) * self.knee**2
'''

_TEST = '''\
"""The conformance checks of kdlosses, and a value computed by hand."""

import kdlosses
import pytest
import torch
from kdlosses.testing import Check, parametrize_with_feature_checks
from $package import $class_name

NAME = "$name"


@parametrize_with_feature_checks([NAME, f"{NAME}:knee=0.2"])
def test_the_loss_conforms(loss: $class_name, check: Check) -> None:
    check(loss)


def test_value_is_that_of_the_formula() -> None:
    loss = kdlosses.build_feature(NAME)
    value = loss.row(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert value.item() == pytest.approx((5**0.5 - 1 + 2**0.5 - 1) / 2, rel=1e-6)
'''

_KIND = Kind(
    "feature loss",
    "features",
    "Features",
    "--features $name:layers=uniform,weight=0.1",
    "one value per token",
    available_features,
)


def new_feature(name: str, output: str | None) -> Path:
    """Create a package that registers the loss on hidden states ``name``.

    Args:
        name: name of the loss on the command line.
        output: output folder; by default ``./kdlosses-<name>``.

    Returns:
        The folder.

    Raises:
        InputError: a name that is malformed or already registered, or an existing folder.
    """
    words = new_words(_KIND, name)
    return write_package(words, Template(_MODULE).substitute(words), _TEST, output)
