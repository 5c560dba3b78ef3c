"""Liger: ``LigerFusedLinearJSDLoss`` against a chunked loss mixed with cross-entropy.

Its Triton kernels (``LigerJSD``, ``LigerTVDLoss``, ``LigerKLDIVLoss``) need a GPU; the fused loss
is plain torch and runs anywhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import IGNORED, assert_same, imported
from torch import Tensor

from kdlosses import KDObjective, Projected, get_loss

ROWS, VOCABULARY = 12, 9


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


HIDDEN, WEIGHT, BIAS = normal(ROWS, 4), normal(VOCABULARY, 4), normal(VOCABULARY)
TEACHER, TEACHER_WEIGHT = normal(ROWS, 6), normal(VOCABULARY, 6)
LABELS = torch.arange(ROWS) % VOCABULARY
LABELS[[1, 5, 6]] = IGNORED


def fused(**options: Any) -> Any:
    module = imported("liger_kernel.chunked_loss.jsd_loss")
    return module.LigerFusedLinearJSDLoss(compiled=False, chunk_size=4, **options)


@pytest.mark.parametrize(("hard", "soft"), [(0.5, 0.5), (0.2, 0.8), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_weights_are_those_of_the_objective_without_the_temperature_s_factor(
    beta: float, temperature: float, hard: float, soft: float
) -> None:
    theirs = fused(beta=beta, temperature=temperature, weight_hard_loss=hard, weight_soft_loss=soft)
    loss = get_loss(
        f"generalized_jsd_chunked:beta={beta}",
        temperature=temperature,
        temperature_scaling=False,
        chunk_size=5,
    )
    ours = KDObjective(loss, kd_ratio=soft)
    teacher = Projected(TEACHER, TEACHER_WEIGHT)
    for student in (HIDDEN, WEIGHT):  # the gradient of the hidden states, then of the head

        def sides(x: Tensor, student: Tensor = student) -> tuple[Tensor, Tensor]:
            return (x, WEIGHT) if student is HIDDEN else (HIDDEN, x)

        assert_same(
            lambda x, sides=sides: theirs(*sides(x), TEACHER, TEACHER_WEIGHT, LABELS, BIAS),
            lambda x, sides=sides: ours(Projected(*sides(x), BIAS), teacher, LABELS).loss,
            student,
        )


def test_a_wider_teacher_meets_phantom_tokens_there_and_is_cut_here() -> None:
    """Liger pads the student's logits with zeros, which gives entries that do not exist mass."""
    wide = torch.cat([TEACHER_WEIGHT, normal(3, 6)])
    theirs = fused(beta=0.5, weight_hard_loss=0.0, weight_soft_loss=1.0)
    ours = get_loss("generalized_jsd_chunked")

    def here(weight: Tensor, teacher_weight: Tensor) -> float:
        return ours(Projected(HIDDEN, weight), Projected(TEACHER, teacher_weight), LABELS).item()

    cut = here(WEIGHT, TEACHER_WEIGHT)
    assert here(WEIGHT, wide) == pytest.approx(cut, rel=1e-6)
    with_zeros = here(torch.cat([WEIGHT, torch.zeros(3, 4)]), wide)
    assert theirs(HIDDEN, WEIGHT, TEACHER, wide, LABELS).item() == pytest.approx(
        with_zeros, rel=1e-5
    )
    assert abs(with_zeros - cut) > 1e-3
