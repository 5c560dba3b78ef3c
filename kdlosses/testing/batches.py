"""Checks that rows, chunks, micro-batches and padding do not affect the result."""

import math

import torch
from torch import Tensor

from kdlosses.divergence import Loss
from kdlosses.sources import Projected
from kdlosses.testing.cases import (
    IGNORED,
    close,
    pair,
    paths,
    permutation,
    projected,
    rows,
    token_loss,
    value_and_gradient,
)
from kdlosses.testing.catalogue import conformance


@conformance()
def _masking(loss: Loss) -> None:
    """Ignored rows have no effect, whatever their content."""
    teacher, student, labels = pair(8, 9)
    kept = torch.tensor([0, 2, 3, 6])
    masked = torch.full_like(labels, IGNORED).index_copy(0, kept, labels[kept])
    spoiled = torch.full_like(student, math.nan).index_copy(0, kept, student[kept])
    for path, evaluate in paths(loss):
        expected, gradient = value_and_gradient(
            evaluate, student[kept], teacher[kept], labels[kept]
        )
        value, full = value_and_gradient(evaluate, spoiled, teacher, masked)
        close(f"{path}: the value with ignored rows", value, expected)
        close(
            f"{path}: the gradient with ignored rows",
            full,
            torch.zeros_like(full).index_copy(0, kept, gradient),
        )


@conformance()
def _all_masked(loss: Loss) -> None:
    """If every row is ignored, the value is 0 and differentiable, with zero gradients."""
    teacher, student, labels = pair(4, 9)
    for path, evaluate in paths(loss):
        value, gradient = value_and_gradient(
            evaluate, student, teacher, torch.full_like(labels, IGNORED)
        )
        if value.item() != 0 or gradient.any():
            raise AssertionError(f"{path}: value {value.item():.3g}, gradient not all 0")


@conformance()
def _chunk_size(loss: Loss) -> None:
    """Value and gradient equal those of the plain evaluation for every chunk size."""
    hidden, weight, teacher, labels = projected(10, 9)

    def run(size: int | None) -> tuple[Tensor, ...]:
        x, head = (leaf.clone().requires_grad_() for leaf in (hidden, weight))
        value = token_loss(loss, size, temperature=1.5)(Projected(x, head), teacher, labels)
        return value.detach(), *torch.autograd.grad(value, (x, head))

    expected = run(None)
    for size in (1, 3, 10, 64):
        names = ("value", "gradient of the hidden states", "gradient of the head")
        for name, got, wanted in zip(names, run(size), expected, strict=True):
            close(f"the {name} in chunks of {size}", got, wanted)


@conformance()
def _row_order(loss: Loss) -> None:
    """The value of a row does not depend on the order of rows."""
    teacher, student, labels = pair(8, 9)
    order = permutation(8)
    expected = rows(loss, student, teacher, labels)[order]
    close(
        "the values in another order",
        rows(loss, student[order], teacher[order], labels[order]),
        expected,
    )


@conformance()
def _batch_split(loss: Loss) -> None:
    """The value of a row does not depend on the size of the batch."""
    teacher, student, labels = pair(8, 9)
    parts = [
        rows(loss, student[cut], teacher[cut], labels[cut]) for cut in (slice(3), slice(3, None))
    ]
    close("the values in two batches", torch.cat(parts), rows(loss, student, teacher, labels))


@conformance()
def _num_tokens(loss: Loss) -> None:
    """Micro-batches with the step's token count sum to the undivided step."""
    teacher, student, labels = pair(9, 9)
    labels[[1, 7, 8]] = IGNORED
    for path, evaluate in paths(loss):
        expected = value_and_gradient(evaluate, student, teacher, labels)
        parts = [
            value_and_gradient(evaluate, student[cut], teacher[cut], labels[cut], num_tokens=6)
            for cut in (slice(2), slice(2, 7), slice(7, None))
        ]
        close(f"{path}: the value", torch.stack([value for value, _ in parts]).sum(), expected[0])
        close(f"{path}: the gradient", torch.cat([part for _, part in parts]), expected[1])


@conformance()
def _padded_heads(loss: Loss) -> None:
    """Entries beyond the shared vocabulary have no effect."""
    teacher, student, labels = pair(5, 9)
    padding = torch.full((5, 4), 20.0, dtype=torch.float64)
    wide_teacher, wide_student = (torch.cat([x, padding], -1) for x in (teacher, student))
    for path, evaluate in paths(loss):
        expected, gradient = value_and_gradient(evaluate, student, teacher, labels)
        value, _ = value_and_gradient(evaluate, student, wide_teacher, labels)
        close(f"{path}: the value with a wider teacher", value, expected)
        value, wide = value_and_gradient(evaluate, wide_student, teacher, labels)
        close(f"{path}: the value with a wider student", value, expected)
        close(f"{path}: its gradient", wide, torch.cat([gradient, 0 * padding], -1))
