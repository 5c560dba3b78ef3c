"""torchtune 0.6: ``torchtune.modules.loss`` against kdlosses."""

from __future__ import annotations

import pytest
import torch
from peers import IGNORED, Batch, assert_same, torchtune

from kdlosses import get_loss

CHUNKS = 3  # of 8 positions: the last chunk is shorter


def test_forward_kl_has_the_teacher_s_entropy_in_addition(batch: Batch) -> None:
    theirs, ours = torchtune().ForwardKLLoss(), get_loss("forward_kl")
    assert batch.teacher_entropy > 0.1
    assert_same(
        lambda x: theirs(x.flatten(0, 1), batch.teacher.flatten(0, 1), batch.labels.flatten()),
        lambda x: ours(x, batch.teacher, batch.labels),
        batch.student,
        beyond=batch.teacher_entropy,
    )


def test_reverse_kl_is_equal(batch: Batch) -> None:
    theirs, ours = torchtune().ReverseKLLoss(), get_loss("reverse_kl")
    assert_same(
        lambda x: theirs(x, batch.teacher, batch.labels),
        lambda x: ours(x, batch.teacher, batch.labels),
        batch.student,
    )


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_sym_kd_ratio_is_forward_weight_and_weighs_the_entropy_too(
    batch: Batch, ratio: float
) -> None:
    theirs = torchtune().SymmetricKLLoss(sym_kd_ratio=ratio)
    ours = get_loss(f"symmetric_kl:forward_weight={ratio}")
    assert_same(
        lambda x: theirs(x, batch.teacher, batch.labels),
        lambda x: ours(x, batch.teacher, batch.labels),
        batch.student,
        beyond=ratio * batch.teacher_entropy,
    )


def test_normalize_false_is_the_sum(batch: Batch) -> None:
    theirs, ours = torchtune().ReverseKLLoss(), get_loss("reverse_kl")
    assert_same(
        lambda x: theirs(x, batch.teacher, batch.labels, normalize=False),
        lambda x: ours(x, batch.teacher, batch.labels, num_tokens=1),
        batch.student,
    )


@pytest.mark.parametrize(
    ("theirs", "ours", "entropies"),
    [
        ("ForwardKLWithChunkedOutputLoss", "forward_kl_chunked", 1.0),
        ("ReverseKLWithChunkedOutputLoss", "reverse_kl_chunked", 0.0),
        ("SymmetricKLWithChunkedOutputLoss", "symmetric_kl_chunked", 0.5),
    ],
)
def test_chunked_losses_take_lists_and_have_the_same_value(
    batch: Batch, theirs: str, ours: str, entropies: float
) -> None:
    peer = getattr(torchtune(), theirs)(num_output_chunks=CHUNKS)
    loss = get_loss(ours, chunk_size=4)
    assert_same(
        lambda x: peer(x.chunk(CHUNKS, 1), batch.teacher.chunk(CHUNKS, 1), batch.labels),
        lambda x: loss(x, batch.teacher, batch.labels),
        batch.student,
        beyond=entropies * batch.teacher_entropy,
    )


def test_a_batch_without_labels_is_a_constant_there_and_connected_here(batch: Batch) -> None:
    nothing = torch.full_like(batch.labels, IGNORED)
    student = batch.student.clone().requires_grad_()
    theirs = torchtune().ForwardKLLoss()(student, batch.teacher, nothing)
    ours = get_loss("forward_kl")(student, batch.teacher, nothing)
    assert theirs.item() == ours.item() == 0
    assert not theirs.requires_grad
    ours.backward()
    assert student.grad is not None
    assert not student.grad.any()
