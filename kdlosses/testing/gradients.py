"""Checks of gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdlosses.divergence import Loss
from kdlosses.sources import Projected
from kdlosses.testing.cases import close, pair, paths, projected, token_loss, value_and_gradient
from kdlosses.testing.catalogue import conformance


@conformance()
def _finite_differences(loss: Loss) -> None:
    """The gradient at T = 1 agrees with finite differences, with detached quantities fixed."""
    _compare_differences(loss, 1.0)


@conformance()
def _finite_differences_softened(loss: Loss) -> None:
    """The gradient at T = 2 agrees with finite differences, with detached quantities fixed."""
    _compare_differences(loss, 2.0)


def _compare_differences(loss: Loss, temperature: float) -> None:
    rows, width, step = 3, 6, 1e-3
    teacher, student, labels = pair(rows, width, 1.5)
    offsets = torch.tensor([-2, -1, 1, 2, -1, -0.5, 0.5, 1], dtype=torch.float64) * step
    directions = torch.eye(width, dtype=torch.float64).expand(rows, -1, -1)
    base = student[None, :, None].expand(len(offsets), rows, width, width)
    evaluate = token_loss(loss, temperature=temperature)
    held = _Detached() if loss.detached else None

    def values(point: Tensor) -> Tensor:
        targets = teacher[None, :, None].expand_as(point)
        picks = labels[None, :, None].expand(point.shape[:-1])
        result: Tensor = evaluate(point, targets, picks, reduction="none")
        return result

    with torch.no_grad():
        moved = base + offsets[:, None, None, None] * directions
        if held is None:
            table = values(moved)
        else:
            with held:
                values(base)
                held.replay()
                table = values(moved)
    a, b, c, d, e, f, g, h = table
    coarse = (a - 8 * b + 8 * c - d) / (12 * step)
    fine = (e - 8 * f + 8 * g - h) / (6 * step)
    smooth = (coarse - fine).abs() <= 1e-6 * (1 + fine.abs())
    if smooth.sum() < 0.75 * smooth.numel():
        raise AssertionError("the value is not differentiable at random distributions")
    for path, evaluate in paths(loss, temperature=temperature):
        leaf = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            evaluate(leaf, teacher, labels, reduction="none").sum(), leaf
        )
        difference = torch.where(smooth, gradient - fine, 0.0).abs().max().item()
        if not difference <= 2e-6 * (1 + fine.abs().max().item()):
            hint = (
                "compute the detached parts from .detach() tensors"
                if loss.detached
                else "does the loss detach something that its trait detached does not name?"
            )
            raise AssertionError(
                f"{path}: gradient and finite differences differ by {difference:.3g}; {hint}"
            )


class _Detached(TorchFunctionMode):
    """Records the results of ``detach`` and replays them, so that they stay fixed."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []
        self._next: Iterator[Tensor] | None = None

    def replay(self) -> None:
        self._next = iter(self._kept)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (torch.Tensor.detach, torch.detach):
            return func(*args, **(kwargs or {}))
        if self._next is not None:
            return next(self._next)
        self._kept.append(func(*args, **(kwargs or {})).clone())
        return self._kept[-1]


@conformance()
def _grad_output(loss: Loss) -> None:
    """The gradient scales with the incoming gradient."""
    teacher, student, labels = pair(6, 9)
    for path, evaluate in paths(loss):
        single, triple = (
            value_and_gradient(evaluate, student, teacher, labels, factor=factor)[1]
            for factor in (1.0, 3.0)
        )
        close(f"{path}: the gradient of 3 times the loss", triple, 3 * single)


@conformance()
def _teacher_gradient(loss: Loss) -> None:
    """The teacher receives no gradient; the student does."""
    teacher, student, labels = pair(6, 9)
    for path, evaluate in paths(loss):
        one, two = (x.clone().requires_grad_() for x in (student, teacher))
        evaluate(one, two, labels).backward()
        if two.grad is not None:
            raise AssertionError(f"{path}: the teacher receives a gradient")
        if one.grad is None or not one.grad.any():
            raise AssertionError(f"{path}: the student receives no gradient")


@conformance()
def _frozen_head(loss: Loss) -> None:
    """A frozen head receives no gradient, and that of the hidden states is unchanged."""
    hidden, weight, teacher, labels = projected(6, 9)
    for path, evaluate in paths(loss):
        found = []
        for trains in (True, False):
            x = hidden.clone().requires_grad_()
            head = weight.clone().requires_grad_(trains)
            evaluate(Projected(x, head), teacher, labels).backward()
            if (head.grad is not None) != trains:
                raise AssertionError(f"{path}: the head's gradient is {head.grad}")
            found.append(x.grad)
        assert found[0] is not None
        assert found[1] is not None
        close(f"{path}: the hidden states' gradient", found[1], found[0])
