from __future__ import annotations

import pytest
import torch

from kdrun.data.collate import IGNORE_INDEX, Collator, shift_labels


def test_d3_padding_is_told_by_place_and_not_by_id() -> None:
    batch = Collator(pad_token_id=2)(
        [
            {"input_ids": [5, 6, 2], "labels": [-100, 6, 2]},
            {"input_ids": [5, 6, 7, 8, 2], "labels": [-100, -100, 7, 8, 2]},
        ]
    )
    assert batch["input_ids"][0].tolist() == [5, 6, 2, 2, 2]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist() == [-100, 6, 2, -100, -100]
    assert batch["shift_labels"][0].tolist() == [6, 2, -100, -100, -100]
    assert batch["shift_labels"][1].tolist() == [-100, 7, 8, 2, -100]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_without_a_padding_token() -> None:
    batch = Collator()([{"input_ids": [5], "labels": [5]}, {"input_ids": [5, 6], "labels": [5, 6]}])
    assert batch["input_ids"][0].tolist() == [5, 0]


def next_token_logits() -> torch.Tensor:
    """Four positions over ids 0 to 3, each sure of the id that follows its own."""
    logits = torch.zeros(1, 4, 4)
    for position in range(4):
        logits[0, position, (position + 1) % 4] = 10.0
    return logits


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    flat = logits.flatten(0, -2), labels.flatten()
    return torch.nn.functional.cross_entropy(*flat, ignore_index=IGNORE_INDEX).item()


def test_n16_labels_are_shifted_once() -> None:
    example = {"input_ids": [0, 1, 2, 3], "labels": [0, 1, 2, 3]}
    batch = Collator(pad_token_id=0)([example])
    logits = next_token_logits()
    # log(1 + 3 exp(-10)); 10 more where labels are shifted twice.
    assert cross_entropy(logits, batch["shift_labels"]) == pytest.approx(0.000136, abs=1e-6)
    twice = shift_labels(batch["shift_labels"])
    assert cross_entropy(logits, twice) == pytest.approx(10.0001, abs=1e-4)


def test_a_mask_uses_the_logits_before_its_tokens() -> None:
    example = {"input_ids": [0, 1, 2, 3], "labels": [-100, -100, 2, 3]}
    batch = Collator(pad_token_id=0)([example])
    used = batch["shift_labels"] != IGNORE_INDEX
    assert used[0].nonzero().flatten().tolist() == [1, 2]
    assert cross_entropy(next_token_logits(), batch["shift_labels"]) == pytest.approx(
        0.000136, abs=1e-6
    )


def test_shifting_matches_the_models_own_loss() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert cross_entropy(logits, shift_labels(labels)) == pytest.approx(own.item(), rel=1e-6)
