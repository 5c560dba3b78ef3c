"""Checks of scheduled parameters and of state between steps."""

import json
import math

import torch
from torch import Tensor

from kdlosses.divergence import Loss
from kdlosses.schedules import Constant
from kdlosses.testing.cases import close, pair
from kdlosses.testing.catalogue import conformance
from kdlosses.token_loss import TokenLoss

# Relative changes between values may be 1e15, and there may be no value to compare with.
_STEP_LOSSES = (3.0, 2.0, 1e-15, 2.5, 0.0, 1.0)


def _moving_fields(loss: Loss) -> list[str]:
    return [name for name, field in type(loss).model_fields.items() if field.annotation is float]


@conformance(lambda loss: bool(_moving_fields(loss)))
def _moving_parameters(loss: Loss) -> None:
    """A scheduled number given as a 0-d tensor has the same effect as the number."""
    teacher, student, labels = pair(6, 9)
    schedules = {name: Constant(value=getattr(loss, name)) for name in _moving_fields(loss)}
    expected = _both(TokenLoss(loss), student, teacher, labels)
    found = _both(TokenLoss(loss, schedules=schedules), student, teacher, labels)
    # Tensors keep a small distance from limits, such as an exponent of 0.
    for what, got, wanted in zip(("value", "gradient"), found, expected, strict=True):
        close(f"the {what} with {', '.join(schedules)} as tensors", got, wanted, 1e-3, 1e-5)


@conformance(lambda loss: loss.stateful)
def _state(loss: Loss) -> None:
    """State only changes in steps, stays finite, and is restored from a checkpoint."""
    teacher, student, labels = pair(6, 9)
    one, other = TokenLoss(loss), TokenLoss(loss)
    for step, value in enumerate(_STEP_LOSSES, start=1):
        before = one.moving_values
        _both(one, student, teacher, labels)
        if one.moving_values != before:
            raise AssertionError("an evaluation changes the state; only next_state may")
        one.advance(step / len(_STEP_LOSSES), [value])
        if set(one.moving_values) != set(before):
            raise AssertionError(
                f"next_state gives {sorted(one.moving_values)} for {sorted(before)}"
            )
    if any(math.isnan(number) for number in one.moving_values.values()):
        raise AssertionError(f"the state is {one.moving_values} after its steps")
    if one.moving_values == other.moving_values:
        raise AssertionError("steps do not change the state: is it needed?")
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    restored = _both(other, student, teacher, labels)
    for got, wanted in zip(restored, _both(one, student, teacher, labels), strict=True):
        close("the value from a restored state", got, wanted)


def _both(
    evaluate: TokenLoss, student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = evaluate(leaf, teacher, labels)
    return value.detach(), torch.autograd.grad(value, leaf)[0]
