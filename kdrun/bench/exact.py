"""The gradients of a step in float64, from the same inputs, and how far others are from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdrun.bench.cases import Case
from kdrun.bench.inputs import IGNORED, Inputs
from kdrun.bench.plan import respell

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 128


@dataclass(frozen=True)
class GradientErrors:
    """The L2 norm of a gradient's error over the norm of the gradient in float64.

    Attributes:
        hidden: error of the gradient of the hidden states.
        weight: error of the gradient of the head.
    """

    hidden: float
    weight: float


def gradient_errors(case: Case, inputs: Inputs, hidden: Tensor, weight: Tensor) -> GradientErrors:
    """Compare gradients with those of the plain evaluation in float64.

    Args:
        case: names the loss.
        inputs: the inputs of the step.
        hidden: gradient of the hidden states.
        weight: gradient of the head.
    """
    exact_hidden, exact_weight = _exact(case, inputs)
    return GradientErrors(_relative(hidden, exact_hidden), _relative(weight, exact_weight))


def bytes_needed(case: Case) -> int:
    """Bytes of the heads, gradients and logits in float64, roughly."""
    settings, point = case.settings, case.point
    heads = 2 * settings.student_width + settings.teacher_width
    logits = 50  # tensors of a few rows of logits, as many as autograd keeps for any loss
    return 8 * (point.vocab * (heads + logits * _ROWS) + point.tokens * heads)


def _exact(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Gradients of the plain evaluation, a few rows at a time: its logits would not fit."""
    import torch

    from kdlosses import KDObjective, Projected, get_loss

    objective = KDObjective(get_loss(respell(case.loss, chunked=False)), case.settings.kd_ratio)
    weight = inputs.weight.detach().double().requires_grad_()
    teacher_weight = inputs.teacher_weight.double()
    gradient = torch.zeros_like(inputs.hidden, dtype=torch.float64)
    for start in range(0, case.point.tokens, _ROWS):
        rows = slice(start, start + _ROWS)
        labels = inputs.labels[rows]
        if (labels == IGNORED).all():
            continue
        hidden = inputs.hidden.detach()[rows].double().requires_grad_()
        teacher = Projected(inputs.teacher_hidden[rows].double(), teacher_weight)
        student = Projected(hidden, weight)
        objective(student, teacher, labels, case.point.supervised).loss.backward()
        assert hidden.grad is not None, "the loss depends on the hidden states"
        gradient[rows] = hidden.grad
    assert weight.grad is not None, "some rows are supervised"
    return gradient, weight.grad


def _relative(found: Tensor, exact: Tensor) -> float:
    """Row by row, because a difference of whole heads in float64 takes gigabytes."""
    import torch

    squares = torch.zeros(2, dtype=torch.float64, device=exact.device)
    for start in range(0, len(exact), 4096):
        rows = slice(start, start + 4096)
        squares[0] += (found[rows].double() - exact[rows]).square().sum()
        squares[1] += exact[rows].square().sum()
    return float((squares[0] / squares[1]).sqrt())
