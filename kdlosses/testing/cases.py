"""Distributions and evaluations for the checks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kdlosses.divergence import Loss
from kdlosses.engine import Chunking
from kdlosses.token_loss import TokenLoss

WIDE = 49152
IGNORED = -100


def token_loss(loss: Loss, chunk_size: int | None = None, temperature: float = 1.0) -> TokenLoss:
    """The loss as a module, plain or in eager chunks."""
    chunking = None if chunk_size is None else Chunking(chunk_size, compiled=False)
    return TokenLoss(loss, chunking=chunking, temperature=temperature)


def paths(loss: Loss, temperature: float = 1.0) -> Iterator[tuple[str, TokenLoss]]:
    """Both evaluations with their names."""
    yield "plain", token_loss(loss, None, temperature)
    yield "chunked", token_loss(loss, 3, temperature)


def rows(
    loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """The value of each row, without the temperature factor."""
    evaluate = TokenLoss(loss, temperature=temperature, temperature_scaling=False)
    values: Tensor = evaluate(student, teacher, labels, reduction="none")
    return values.detach()


def normal(*shape: int) -> Tensor:
    """Standard normal numbers on the default device, the same for a shape on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def permutation(size: int) -> Tensor:
    """A permutation, the same for a size."""
    generator = torch.Generator().manual_seed(size)
    order = torch.randperm(size, generator=generator, device="cpu")
    return order.to(torch.get_default_device())


def pair(
    rows: int, width: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a teacher and a student ``[rows, width]``, and labels ``[rows]``."""
    teacher, student = (scale * normal(2, rows, width)).to(dtype).unbind()
    return teacher, student, torch.arange(rows) * 7 % width


def projected(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, the teacher's logits, labels."""
    teacher, _, labels = pair(rows, width)
    return normal(rows, 4), normal(width, 4), teacher, labels


def value_and_gradient(
    evaluate: TokenLoss,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_tokens: int | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``factor`` times the loss, and its gradient with respect to the student's logits."""
    leaf = student.clone().requires_grad_()
    value = factor * evaluate(leaf, teacher, labels, num_tokens)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def close(
    what: str, got: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    """Raise an AssertionError that describes the difference, if any."""
    if got.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(got.shape)}, expected {list(expected.shape)}")
    wrong = ~torch.isclose(got, expected, rtol=rtol, atol=atol)
    if wrong.any():
        raise AssertionError(
            f"{what} is {got[wrong][0].item():.6g} instead of {expected[wrong][0].item():.6g}"
        )


def no_nan(what: str, values: Tensor) -> None:
    """Raise an AssertionError if a value is NaN; infinities are accepted."""
    if values.isnan().any():
        raise AssertionError(f"{what} is NaN")


def finite(what: str, values: Tensor) -> None:
    """Raise an AssertionError if a value is not finite."""
    if not values.isfinite().all():
        raise AssertionError(f"{what} is not finite")
