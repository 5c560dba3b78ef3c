"""TRL: the generalized JSD of its GKD trainer, and the kernel of its distillation trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import IGNORED, Batch, assert_same, imported

from kdlosses import Projected, get_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def generalized_jsd_loss() -> Any:
    return imported("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_is_equal_without_the_factor_of_the_temperature(
    batch: Batch, beta: float, temperature: float
) -> None:
    theirs = generalized_jsd_loss()
    teacher = batch.teacher.double()
    plain = get_loss(
        f"generalized_jsd:beta={beta}", temperature=temperature, temperature_scaling=False
    )
    scaled = get_loss(f"generalized_jsd:beta={beta}", temperature=temperature)
    for ours, factor in ((plain, 1.0), (scaled, temperature**-2)):
        assert_same(
            lambda x: theirs(x, teacher, batch.labels, beta, temperature),
            lambda x, ours=ours: ours(x, teacher, batch.labels),
            batch.student.double(),
            factor=factor,
            rtol=1e-9,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    ("reduction", "divisor"),
    [
        ("batchmean", "rows"),  # supervised rows where labels are given, in spite of the name
        ("sum", "one"),
        ("mean", "elements"),
    ],
)
def test_reductions_differ_by_their_denominator(batch: Batch, reduction: str, divisor: str) -> None:
    rows = int(batch.kept.sum())
    num_tokens = {"rows": rows, "one": 1, "elements": rows * batch.student.shape[-1]}[divisor]
    theirs, ours = generalized_jsd_loss(), get_loss("generalized_jsd")
    assert_same(
        lambda x: theirs(x, batch.teacher, batch.labels, reduction=reduction),
        lambda x: ours(x, batch.teacher, batch.labels, num_tokens=num_tokens),
        batch.student,
        atol=1e-7,
    )


def test_num_items_in_batch_is_num_tokens(batch: Batch) -> None:
    theirs, ours = generalized_jsd_loss(), get_loss("generalized_jsd")
    assert_same(
        lambda x: theirs(x, batch.teacher, batch.labels, num_items_in_batch=29),
        lambda x: ours(x, batch.teacher, batch.labels, num_tokens=29),
        batch.student,
    )


def test_no_reduction_gives_the_terms_of_the_supervised_rows(batch: Batch) -> None:
    theirs = generalized_jsd_loss()(batch.student, batch.teacher, batch.labels, reduction="none")
    ours = get_loss("generalized_jsd")(batch.student, batch.teacher, batch.labels, reduction="none")
    assert theirs.shape == (batch.kept.sum(), batch.student.shape[-1])
    assert ours.shape == batch.labels.shape
    torch.testing.assert_close(theirs.sum(-1), ours[batch.kept], rtol=1e-5, atol=1e-6)


def test_a_batch_without_labels_is_zero_and_connected_on_both_sides(batch: Batch) -> None:
    nothing = torch.full_like(batch.labels, IGNORED)
    for evaluate in (generalized_jsd_loss(), get_loss("generalized_jsd")):
        student = batch.student.clone().requires_grad_()
        value = evaluate(student, batch.teacher, nothing)
        value.backward()
        assert value.item() == 0
        assert student.grad is not None
        assert not student.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_the_chunked_kernel_is_equal_row_by_row(beta: float, temperature: float) -> None:
    kernel = imported("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    generator = torch.Generator().manual_seed(7)
    hidden, teacher_hidden, weight, teacher_weight = (
        torch.randn(*shape, generator=generator) for shape in ((9, 4), (9, 6), (13, 4), (13, 6))
    )
    weights = torch.rand(9, generator=generator)
    labels = torch.zeros(9, dtype=torch.int64)
    ours = get_loss(
        f"generalized_jsd_chunked:beta={beta}",
        temperature=temperature,
        temperature_scaling=False,
        chunk_size=4,
    )

    def kernel_sum(x: torch.Tensor) -> torch.Tensor:
        rows, _entropy = kernel.apply(
            x, weight, None, teacher_hidden, teacher_weight, None, beta, temperature
        )
        return (rows * weights).sum()

    def our_sum(x: torch.Tensor) -> torch.Tensor:
        sources = Projected(x, weight), Projected(teacher_hidden, teacher_weight)
        return (ours(*sources, labels, reduction="none") * weights).sum()

    assert_same(kernel_sum, our_sum, hidden)
