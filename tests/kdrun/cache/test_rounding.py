"""Top-k in 16 bits: losses are those of the unrounded teacher, computed here in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kdlosses
from kdrun.cache.rounding import restore_top_k, round_top_k

LOSSES = ("forward_kl", "reverse_kl", "generalized_jsd")
ROWS, VOCAB = 128, 2000


def wanted_loss(name: str, teacher: Tensor, student: Tensor, k: int) -> float:
    """The mean over rows of the loss between k + 1 events, from logits in float64."""
    kept = teacher.topk(k, -1).indices

    def events(logits: Tensor) -> Tensor:
        probs = torch.softmax(logits, -1)
        others = probs.scatter(-1, kept, 0.0).sum(-1, keepdim=True)
        return torch.cat([probs.gather(-1, kept), others], -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(-1)

    p, q = events(teacher), events(student)
    if name == "forward_kl":
        return float(kl(p, q).mean())
    if name == "reverse_kl":
        return float(kl(q, p).mean())
    mixture = (p + q) / 2
    return float((kl(p, mixture) + kl(q, mixture)).mean() / 2)


def stored(teacher: Tensor, k: int) -> kdlosses.TopK:
    """The top k of logits, once rounded and restored."""
    whole = kdlosses.TopK.from_logits(teacher.float(), k)
    log_probs, tail = restore_top_k(*round_top_k(whole.log_probs, whole.tail_log_prob))
    return kdlosses.TopK(log_probs, whole.indices, tail, teacher.shape[-1])


def of_spread(spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return spread * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "spread", [0.0, 0.05, 2.5, 8.0], ids=["uniform", "flat", "usual", "peaked"]
)
@pytest.mark.parametrize("distance", [0.3, 2.0], ids=["near", "far"])
@pytest.mark.parametrize("k", [5, 20, 64])
def test_the_loss_moves_by_less_than_a_thousandth(
    loss: str, spread: float, distance: float, k: int
) -> None:
    teacher = of_spread(spread)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    student = teacher + distance * noise
    found = kdlosses.get_loss(loss)(
        student.float(), stored(teacher, k), torch.zeros(ROWS, dtype=torch.int64)
    )
    assert float(found) == pytest.approx(wanted_loss(loss, teacher, student, k), rel=1e-3)


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_a_real_teacher_moves_by_less_than_a_thousandth(
    real_logits: Tensor, loss: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(real_logits.shape, generator=generator, dtype=torch.float64)
    labels = torch.zeros(len(real_logits), dtype=torch.int64)
    for k in (20, 128):
        for student in (real_logits + 0.3 * noise, real_logits / 1.5 + noise):
            found = kdlosses.get_loss(loss)(student.float(), stored(real_logits, k), labels)
            wanted = wanted_loss(loss, real_logits, student, k)
            assert float(found) == pytest.approx(wanted, rel=1e-3)


@pytest.fixture(scope="module")
def real_logits(smollm2_folder: Path, shared_data: Path) -> Tensor:
    """SmolLM2's logits of the answers to some instructions, in float64."""
    from kdrun.data.collate import Collator
    from kdrun.data.encode import encode_chats
    from kdrun.data.rows import load_rows
    from kdrun.models.load import load_model
    from kdrun.models.locate import locate_model
    from kdrun.models.tokenizers import load_tokenizer

    rows: Any = load_rows(shared_data / "alpaca_en_demo.json").rows[:6]
    batch = Collator(0)(encode_chats(rows, load_tokenizer(smollm2_folder), 96).examples)
    with torch.no_grad():
        logits = load_model(locate_model(smollm2_folder))(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    return logits[batch["shift_labels"] != -100].double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("spread", [0.0, 0.05, 2.5, 8.0, 100.0])
def test_the_events_have_a_sum_of_one(spread: float) -> None:
    for k in (1, 20, VOCAB):
        found = stored(of_spread(spread), k)
        kept = found.log_probs.double().exp().sum(-1)
        assert (kept <= 1 + 1e-6).all()
        torch.testing.assert_close(
            kept + found.tail_log_prob.double().exp(), torch.ones(ROWS, dtype=torch.float64),
            rtol=0, atol=2e-6,
        )  # fmt: skip


def test_probabilities_below_the_range_of_float16_are_zero() -> None:
    rare = torch.tensor([[0.0, -20.0, -65503.0, -65530.0, -1e30, -math.inf]])
    distances, tail = round_top_k(rare, torch.tensor([-70000.0]))
    assert distances.dtype == torch.float16
    assert distances[0, :2].tolist() == [0.0, -20.0]
    assert distances[0, 2] == -65504
    assert (distances[0, 3:] == -math.inf).all()
    assert tail.tolist() == [-70000.0]  # float32
    log_probs, _ = restore_top_k(distances, tail)
    assert not log_probs.isnan().any()
    assert log_probs[0, 3:].tolist() == [-math.inf] * 3


def test_a_token_that_is_certain_and_rows_without_one_are_kept() -> None:
    certain = torch.tensor([[0.0, -math.inf]])
    log_probs, tail = restore_top_k(*round_top_k(certain, torch.tensor([-math.inf])))
    assert log_probs.tolist() == certain.tolist()
    assert tail.tolist() == [-math.inf]
    nothing = torch.full((1, 2), -math.inf)  # all mass is in the tail
    log_probs, tail = restore_top_k(*round_top_k(nothing, torch.zeros(1)))
    assert log_probs.tolist() == nothing.tolist()
    assert tail.tolist() == [0.0]


def test_log_probabilities_in_float32_are_read_unchanged() -> None:
    """As in caches written before: restoring does nothing to what has a sum of 1 already."""
    whole = kdlosses.TopK.from_logits(of_spread(2.5).float(), 20)
    log_probs, tail = restore_top_k(whole.log_probs, whole.tail_log_prob)
    torch.testing.assert_close(log_probs, whole.log_probs, rtol=0, atol=2e-6)
    torch.testing.assert_close(tail, whole.tail_log_prob, rtol=0, atol=2e-6)
