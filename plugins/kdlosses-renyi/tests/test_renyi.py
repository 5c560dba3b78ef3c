import math

import pytest
import torch

import kdlosses
from kdlosses.testing import Check, parametrize_with_checks

P = [0.7, 0.2, 0.1]
Q = [0.2, 0.3, 0.5]


def expected(alpha: float) -> float:
    return math.log(sum(p**alpha * q ** (1 - alpha) for p, q in zip(P, Q, strict=True))) / (
        alpha - 1
    )


@parametrize_with_checks(
    ["renyi", "renyi:alpha=0.5", "renyi:alpha=0.9", "renyi:alpha=1.1", "renyi:alpha=5"]
)
def test_the_loss_conforms(loss: kdlosses.Loss, check: Check) -> None:
    check(loss)


@pytest.mark.parametrize("name", ["renyi", "renyi_chunked"])
@pytest.mark.parametrize("alpha", [0.5, 2.0, 5.0])
def test_value_is_that_of_the_formula(name: str, alpha: float) -> None:
    loss = kdlosses.get_loss(f"{name}:alpha={alpha}")
    value = loss(torch.tensor([Q]).log(), torch.tensor([P]).log(), torch.tensor([0]))
    assert value.item() == pytest.approx(expected(alpha), rel=1e-6)


def test_a_value_whose_sum_overflows_is_finite() -> None:
    teacher = torch.tensor([[0.0, -200.0]])
    student = torch.tensor([[-200.0, 0.0]])
    loss = kdlosses.get_loss("renyi:alpha=2")
    value = loss(student, teacher, torch.tensor([0]))
    assert value.item() == pytest.approx(200.0, rel=1e-6)


@pytest.mark.parametrize("alpha", ["0", "-1", "1"])
def test_orders_without_a_divergence_are_refused(alpha: str) -> None:
    with pytest.raises(kdlosses.LossSpecError, match="alpha"):
        kdlosses.get_loss(f"renyi:alpha={alpha}")
