"""DistiLLM and ABKD, whose code is in repositories that are no packages.

``KDLOSSES_DISTILLM`` names a checkout of github.com/jongwooko/distillm, ``KDLOSSES_ABKD`` one of
github.com/ghwang-s/abkd; without them these tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import Batch, assert_same, checkout
from torch import Tensor

from kdlosses import get_loss


def distillm() -> Any:
    return checkout("KDLOSSES_DISTILLM", "DistiLLM", "distillm/losses.py")


def abkd() -> Any:
    return checkout("KDLOSSES_ABKD", "ABKD", "distillation_llm/distillm/losses.py")


def check(
    batch: Batch,
    theirs: Any,
    spec: str,
    *,
    factor: float = 1.0,
    beyond: float = 0.0,
    **options: Any,
) -> None:
    """Compare a function of (logits, teacher's logits, batch) with a loss."""
    ours = get_loss(spec)
    labels = {"label": batch.labels}
    assert_same(
        lambda x: theirs(x, batch.teacher, labels, **options),
        lambda x: ours(x, batch.teacher, batch.labels),
        batch.student,
        factor=factor,
        beyond=beyond,
        rtol=1e-4,
        atol=1e-5,
    )


def test_forward_kl_has_the_teacher_s_entropy_in_addition(batch: Batch) -> None:
    check(batch, distillm().forward_kl, "forward_kl", beyond=batch.teacher_entropy)


def test_reverse_kl_is_equal(batch: Batch) -> None:
    check(batch, distillm().reverse_kl, "reverse_kl")


@pytest.mark.parametrize("lam", [0.25, 0.9])
def test_lam_of_the_symmetric_kl_is_the_weight_of_the_reverse_part(
    batch: Batch, lam: float
) -> None:
    spec = f"symmetric_kl:forward_weight={1 - lam}"
    beyond = (1 - lam) * batch.teacher_entropy
    check(batch, distillm().symmetric_kl, spec, beyond=beyond, lam=lam)


@pytest.mark.parametrize("lam", [0.25, 0.9])
def test_lam_of_the_js_distance_is_one_minus_beta(batch: Batch, lam: float) -> None:
    check(batch, distillm().js_distance, f"generalized_jsd:beta={1 - lam}", lam=lam)


@pytest.mark.parametrize("skew", [0.1, 0.6])
def test_skew_alpha_is_alpha(batch: Batch, skew: float) -> None:
    entropy = batch.teacher_entropy
    module = distillm()
    check(
        batch, module.skewed_forward_kl, f"skew_forward_kl:alpha={skew}", beyond=entropy, lam=skew
    )
    check(batch, module.skewed_reverse_kl, f"skew_reverse_kl:alpha={skew}", lam=skew)


def test_tv_distance_is_equal(batch: Batch) -> None:
    check(batch, distillm().tv_distance, "total_variation")


def test_a_batch_without_labels_is_nan_there_and_zero_here(batch: Batch) -> None:
    nothing = torch.full_like(batch.labels, -100)
    theirs = distillm().reverse_kl(batch.student, batch.teacher, {"label": nothing})
    assert theirs.isnan()
    assert get_loss("reverse_kl")(batch.student, batch.teacher, nothing).item() == 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.5, 0.5), (1.5, -0.5), (2.0, 0.4)])
def test_alpha_and_beta_of_abkd_are_ours(batch: Batch, alpha: float, beta: float) -> None:
    spec = f"alpha_beta:alpha={alpha},beta={beta}"
    check(batch, abkd().ab_div, spec, alpha=alpha, beta=beta)


def test_both_zero_is_equal(batch: Batch) -> None:
    check(batch, abkd().ab_div, "alpha_beta:alpha=0,beta=0", alpha=0, beta=0)


@pytest.mark.parametrize(
    ("alpha", "beta", "exponent"),
    [(0.5, 0, 0.5), (2.0, 0, 2.0), (0, 0.5, 0.5), (0.5, -0.5, 0.5), (2.0, -2.0, 2.0)],
)
def test_abkd_divides_its_limits_by_the_exponent_once_and_we_twice(
    batch: Batch, alpha: float, beta: float, exponent: float
) -> None:
    """The limit of the general formula has the square, so that the family is continuous."""
    spec = f"alpha_beta:alpha={alpha},beta={beta}"
    check(batch, abkd().ab_div, spec, factor=exponent, alpha=alpha, beta=beta)


def test_akl_is_adaptive_kl_with_mass_one_half(batch: Batch) -> None:
    module = abkd()

    def theirs(logits: Tensor, teacher: Tensor, labels: dict[str, Tensor]) -> Tensor:
        value: Tensor = module.AKL(teacher, logits, labels)
        return value

    check(batch, theirs, "adaptive_kl:mass=0.5")
