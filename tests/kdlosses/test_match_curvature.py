"""``match_curvature``: every loss as strong as KL near equality."""

import pytest
import torch

import kdlosses

STATED = [
    ref.name
    for ref in kdlosses.available_losses()
    if ref.distribution == "kdlosses" and kdlosses.get_loss(ref.name).loss.curvature() is not None
]


@pytest.mark.parametrize("suffix", ["", "_chunked"])
@pytest.mark.parametrize("name", [name for name in STATED if name != "decoupled_kd"])
def test_near_equality_the_value_is_half_the_chi_square(name: str, suffix: str) -> None:
    teacher = torch.randn(4, 11, dtype=torch.float64)
    student = teacher + 1e-4 * torch.randn(4, 11, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = ((p - q) ** 2 / p).sum(-1).mean() / 2
    options = {"compiled": False} if suffix else {}
    loss = kdlosses.get_loss(name + suffix, match_curvature=True, **options)
    value = loss(student, teacher, torch.zeros(4, dtype=torch.long))
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_loss_without_curvature_is_refused() -> None:
    with pytest.raises(kdlosses.LossSpecError, match=r"total_variation.*no curvature"):
        kdlosses.get_loss("total_variation", match_curvature=True)
