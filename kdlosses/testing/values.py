"""Checks of values."""

import torch
from torch import Tensor

from kdlosses.divergence import Divergence, Loss
from kdlosses.testing.cases import WIDE, close, pair, rows
from kdlosses.testing.catalogue import conformance

_ROUNDING = 5e-7  # of the logarithm of a float32 sum near 1, which is unavoidable


@conformance(lambda loss: loss.nonnegative)
def _nonnegative(loss: Loss) -> None:
    """No value, and no term of a sum, is below 0 on random distributions."""
    for scale in (0.1, 1.0, 5.0, 20.0):
        teacher, student, labels = pair(20, 50, scale, torch.float32)
        _at_least_zero(loss, student, teacher, labels)


@conformance(lambda loss: loss.nonnegative)
def _nonnegative_near_equality(loss: Loss) -> None:
    """No value, and no term of a sum, is below 0 near equality on a wide vocabulary."""
    teacher, noise, labels = pair(3, WIDE, 2.0, torch.float32)
    for scale in (1e-1, 1e-2, 1e-3, 1e-5):
        _at_least_zero(loss, teacher + scale * noise, teacher, labels)


def _at_least_zero(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    lowest = rows(loss, student, teacher, labels).min().item()
    if not lowest >= -_rounding(loss):
        raise AssertionError(f"the lowest value is {lowest:.3g}")
    if isinstance(loss, Divergence) and loss.reduction == "sum":
        term = loss.integrand(teacher.log_softmax(-1), student.log_softmax(-1)).min().item()
        if not term >= 0:
            raise AssertionError(
                f"the lowest term is {term:.3g}: the sum cancels (kdlosses.numerics.kl_terms)"
            )


def _rounding(loss: Loss) -> float:
    """The rounding error of 0 in float32 if the total is a logarithm, after finish."""
    if not isinstance(loss, Divergence) or loss.reduction == "sum":
        return 0.0
    with torch.no_grad():
        ends = loss.finish(torch.tensor([0.0, _ROUNDING], dtype=torch.float64))
    return (ends[1] - ends[0]).abs().item()


@conformance(lambda loss: loss.zero_at_equality)
def _zero_at_equality(loss: Loss) -> None:
    """The value is 0 if the distributions are equal, and not 0 if they differ."""
    tolerance = max(1e-6, _rounding(loss))
    for width in (20, WIDE):
        teacher, student, labels = pair(3, width, 3.0, torch.float32)
        for temperature in (1.0, 2.0):
            same = rows(loss, teacher, teacher, labels, temperature=temperature)
            close(
                f"the value at equality, V={width}, T={temperature:g}", same, 0 * same, 0, tolerance
            )
    apart = rows(loss, student, teacher, labels)
    if not (apart.abs() > 1e-4).all():
        raise AssertionError(f"the value is {apart[0].item():.3g} for distributions that differ")


@conformance(lambda loss: loss.coarse_graining_monotone)
def _coarse_graining(loss: Loss) -> None:
    """Merging tokens never increases the value."""
    teacher, student, labels = pair(50, 12)
    logits = [teacher, student]
    fine = rows(loss, student, teacher, labels)
    for groups in (6, 4, 2):
        merged = [x.view(50, groups, -1).logsumexp(-1) for x in logits]
        coarse = rows(loss, merged[1], merged[0], labels % groups)
        if (coarse > fine * (1 + 1e-9) + 1e-12).any():
            raise AssertionError(
                f"merging 12 tokens into {groups} raises a value by "
                f"{(coarse - fine).max().item():.3g}; set coarse_graining_monotone = False"
            )


@conformance()
def _temperature_power(loss: Loss) -> None:
    """Near equality the value decreases like T ** -temperature_power."""
    teacher, noise, labels = pair(8, 30)
    excess = [
        _excess(loss, teacher + 0.1 * noise, teacher, labels, temperature).abs().mean()
        for temperature in (50.0, 100.0)
    ]
    measured = (excess[0] / excess[1]).log2().item()
    if not abs(measured - loss.temperature_power) < 0.1:
        raise AssertionError(
            f"measured power {measured:.2f}, temperature_power is {loss.temperature_power}"
        )


@conformance(lambda loss: loss.curvature() is not None)
def _curvature(loss: Loss) -> None:
    """Near equality the value is curvature / 2 * sum (p - q)^2 / p."""
    stated = loss.curvature()
    if stated is None:
        return
    teacher, noise, labels = pair(6, 20)
    measured = torch.zeros(6, dtype=torch.float64)
    for sign in (1e-3, -1e-3):  # both signs, so that third-order terms cancel
        student = teacher + sign * noise
        p, q = teacher.softmax(-1), student.softmax(-1)
        unit = ((p - q) ** 2 / p).sum(-1) / 2
        measured += _excess(loss, student, teacher, labels) / unit / 2
    worst = measured[(measured - stated).abs().argmax()].item()
    if not abs(worst - stated) < 2e-3:
        raise AssertionError(f"measured {worst:.4g}, curvature() returns {stated:g}")


def _excess(
    loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """The value minus the value at equality."""
    apart = rows(loss, student, teacher, labels, temperature=temperature)
    return apart - rows(loss, teacher, teacher, labels, temperature=temperature)


@conformance()
def _shift_invariance(loss: Loss) -> None:
    """Adding a constant to all logits of a row has no effect."""
    teacher, student, labels = pair(5, 12)
    expected = rows(loss, student, teacher, labels)
    close("the student shifted by 30", rows(loss, student + 30, teacher, labels), expected)
    close("the teacher shifted by -30", rows(loss, student, teacher - 30, labels), expected)
