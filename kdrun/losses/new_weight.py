"""``kdrun weights new``: create a package with one token weight and its tests."""

from __future__ import annotations

from pathlib import Path
from string import Template

from kdlosses import available_weights
from kdrun.losses.new import Kind, new_words, write_package

_MODULE = '''\
"""The token weight $name: replace the example with your own formula."""

from kdlosses import TokenWeight
from pydantic import Field
from torch import Tensor


class $class_name(TokenWeight):
    """The student's surprise at the label, w = min(-log q_y, limit) / limit.

    Between 0 and 1, so that tokens which the student already predicts count little.

    Not recommended for noisy labels, which surprise a good student most.

    Reference: your paper.
    """

    limit: float = Field(5.0, gt=0, description="surprise in nats from which the weight is 1")

    def weigh(self, teacher_log_probs: Tensor, student_log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return one weight per row, at least 0; no gradient flows through it."""
        label = student_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (-label / self.limit).clamp(0, 1)
'''

_TEST = '''\
"""The conformance checks of kdlosses, and a value computed by hand."""

import math

import kdlosses
import pytest
import torch
from kdlosses.testing import Check, parametrize_with_weight_checks
from $package import $class_name

NAME = "$name"


@parametrize_with_weight_checks([NAME, f"{NAME}:limit=0.5"])
def test_the_weight_conforms(weight: $class_name, check: Check) -> None:
    check(weight)


def test_value_is_that_of_the_formula() -> None:
    teacher = torch.tensor([[0.5, 0.5]]).log()
    student = torch.tensor([[0.25, 0.75]]).log()
    objective = kdlosses.KDObjective(
        kdlosses.get_loss("forward_kl"), 1.0, kdlosses.get_weight(NAME)
    )
    out = objective(student, teacher, torch.tensor([0]))
    assert out.weight_sums[0].item() == pytest.approx(math.log(4) / 5, rel=1e-6)
'''

_KIND = Kind(
    "token weight",
    "weights",
    "Weight",
    "--token-weight $name",
    "one weight per token",
    available_weights,
)


def new_weight(name: str, output: str | None) -> Path:
    """Create a package that registers the token weight ``name``.

    Args:
        name: name of the token weight on the command line.
        output: output folder; by default ``./kdlosses-<name>``.

    Returns:
        The folder.

    Raises:
        InputError: a name that is malformed or already registered, or an existing folder.
    """
    words = new_words(_KIND, name)
    return write_package(words, Template(_MODULE).substitute(words), _TEST, output)
