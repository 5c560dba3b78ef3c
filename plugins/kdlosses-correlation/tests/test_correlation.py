import math
from statistics import correlation, fmean, stdev

import pytest
import torch

import kdlosses
from kdlosses.testing import Check, parametrize_with_checks

P = [0.7, 0.2, 0.1]
Q = [0.2, 0.3, 0.5]
LABEL = torch.tensor([0])


def standardized_kl(teacher: list[float], student: list[float], tau: float) -> float:
    def softmax_of_scores(logits: list[float]) -> list[float]:
        mean, deviation = fmean(logits), stdev(logits)
        powers = [math.exp((z - mean) / deviation / tau) for z in logits]
        return [power / sum(powers) for power in powers]

    pairs = zip(softmax_of_scores(teacher), softmax_of_scores(student), strict=True)
    return tau**2 * sum(p * math.log(p / q) for p, q in pairs)


def value(spec: str, teacher: list[float], student: list[float], **options: float) -> float:
    """Of one row of logits, in float64."""
    rows = (torch.tensor([row], dtype=torch.float64) for row in (student, teacher))
    return kdlosses.get_loss(spec, **options)(*rows, LABEL).item()


def logs(probabilities: list[float]) -> list[float]:
    return [math.log(p) for p in probabilities]


@parametrize_with_checks(
    [
        "pearson",
        "standardized_kl",
        "standardized_kl:base_temperature=0.5",
        "standardized_kl:base_temperature=8",
    ]
)
def test_the_loss_conforms(loss: kdlosses.Loss, check: Check) -> None:
    check(loss)


@pytest.mark.parametrize("name", ["pearson", "pearson_chunked"])
def test_pearson_is_one_minus_the_correlation(name: str) -> None:
    assert value(name, logs(P), logs(Q)) == pytest.approx(1 - correlation(P, Q), rel=1e-9)


def test_pearson_is_zero_for_the_teacher_mixed_with_the_uniform_distribution() -> None:
    mixed = [0.4 * p + 0.6 / 3 for p in P]
    assert value("pearson", logs(P), logs(mixed)) == pytest.approx(0, abs=1e-15)


def test_pearson_reaches_two_for_the_opposite_order() -> None:
    opposite = [2 / 3 - p for p in [0.5, 0.3, 0.2]]
    assert value("pearson", logs([0.5, 0.3, 0.2]), logs(opposite)) == pytest.approx(2)


@pytest.mark.parametrize("name", ["standardized_kl", "standardized_kl_chunked"])
@pytest.mark.parametrize("tau", [0.5, 2.0, 8.0])
def test_standardized_kl_is_that_of_the_formula(name: str, tau: float) -> None:
    teacher, student = [2.0, -1.0, 0.5, 0.0], [0.3, 0.1, -0.2, 0.4]
    expected = standardized_kl(teacher, student, tau)
    found = value(f"{name}:base_temperature={tau}", teacher, student)
    assert found == pytest.approx(expected, rel=1e-9)


def test_standardized_kl_sees_neither_a_factor_nor_the_temperature() -> None:
    teacher, student = [2.0, -1.0, 0.5, 0.0], [0.3, 0.1, -0.2, 0.4]
    expected = value("standardized_kl", teacher, student)
    assert expected > 0.1
    stretched = [7 * z + 3 for z in student]
    assert value("standardized_kl", teacher, stretched) == pytest.approx(expected, rel=1e-9)
    softened = value("standardized_kl", teacher, student, temperature=4.0)
    assert softened == pytest.approx(expected, rel=1e-9)
    assert value("standardized_kl", student, stretched) == pytest.approx(0, abs=1e-12)


def test_standardized_kl_leaves_impossible_tokens_out_of_mean_and_deviation() -> None:
    teacher, student = [2.0, -1.0, 0.5, 0.0], [0.3, 0.1, -0.2, 0.4]
    padded = value("standardized_kl", [*teacher, -math.inf], [*student, -math.inf])
    assert padded == pytest.approx(value("standardized_kl", teacher, student), rel=1e-9)


def test_standardized_kl_is_infinite_where_the_student_rules_out_a_token() -> None:
    assert value("standardized_kl", [0.0, 1.0, 2.0], [0.0, 1.0, -math.inf]) == math.inf
    assert math.isfinite(value("standardized_kl", [0.0, 1.0, -math.inf], [0.0, 1.0, 2.0]))


@pytest.mark.parametrize("name", ["pearson", "standardized_kl"])
@pytest.mark.parametrize("wide", [3, 49152])
@pytest.mark.parametrize("uniform", ["teacher", "student", "both"])
def test_uniform_rows_give_finite_values_and_gradients(name: str, wide: int, uniform: str) -> None:
    rows = {side: torch.randn(4, wide) for side in ("teacher", "student")}
    for side in ("teacher", "student") if uniform == "both" else (uniform,):
        rows[side] = torch.full((4, wide), 1.7)
    student = rows["student"].requires_grad_()
    loss = kdlosses.get_loss(name)
    found = loss(student, rows["teacher"], torch.zeros(4, dtype=torch.int64))
    found.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if uniform == "both":
        assert found.item() == pytest.approx(0, abs=1e-6)
    else:
        assert found.isfinite()
        assert found.item() > 1e-3


@pytest.mark.parametrize("name", ["pearson", "standardized_kl"])
def test_a_row_with_one_possible_token_is_finite(name: str) -> None:
    student = torch.tensor([[0.0, -math.inf, -math.inf]], requires_grad=True)
    found = kdlosses.get_loss(name)(student, student.detach().clone(), LABEL)
    found.backward()
    assert found.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("tau", ["0", "-1", "101"])
def test_impossible_temperatures_are_refused(tau: str) -> None:
    with pytest.raises(kdlosses.LossSpecError, match="base_temperature"):
        kdlosses.get_loss(f"standardized_kl:base_temperature={tau}")
