"""``kdrun weights new``: create a package with one token weight and its tests."""

from __future__ import annotations

from pathlib import Path
from string import Template

from kdlosses import available_weights
from kdrun.errors import InputError
from kdrun.losses.new import check_new_name, class_name_of, words_of, write_package

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
from kdlosses.testing import WeightCheck, parametrize_with_weight_checks
from $package import $class_name

NAME = "$name"


@parametrize_with_weight_checks([NAME, f"{NAME}:limit=0.5"])
def test_the_weight_conforms(weight: $class_name, check: WeightCheck) -> None:
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
    check_new_name("token weight", name)
    taken = [ref.distribution for ref in available_weights() if ref.name == name]
    if taken:
        raise InputError(
            f"token weight {name!r} is already registered by {taken[0]}; choose another name"
        )
    words = words_of(name, class_name_of(name, "Weight"))
    words |= {
        "what": "token weight",
        "group": "weights",
        "use": f"--token-weight {name}",
        "parts": "one weight per token",
    }
    return write_package(words, Template(_MODULE).substitute(words), _TEST, output)
