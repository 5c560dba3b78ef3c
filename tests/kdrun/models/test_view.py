"""The teacher's distributions at the student's positions, against the teacher on its own text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair_configs import tiny_llama

import kdlosses
from kdlosses import Projected, Sampled, TopK
from kdrun.data.collate import Collator
from kdrun.data.pack import pack
from kdrun.models.heads import FrozenTeacher, HeadSplit, find_split
from kdrun.models.view import aligned, source_of

VOCAB = 31


def example(own: int, there: int, turns: list[list[int]]) -> dict[str, list[int]]:
    """Answers after prompts of two lengths; tokens of prompts are below 10, of answers above."""
    found: dict[str, list[int]] = {}
    for name, labels, length in (
        ("input_ids", "labels", own),
        ("teacher_input_ids", "teacher_labels", there),
    ):
        ids: list[int] = []
        kept: list[int] = []
        for number, answer in enumerate(turns):
            prompt = [1 + (number + place * length) % 9 for place in range(length + number)]
            ids += [*prompt, *answer]
            kept += [-100] * len(prompt) + answer
        found |= {name: ids, labels: kept}
    return found


EXAMPLES = [
    example(3, 11, [[12, 13, 14], [15, 16]]),
    example(9, 2, [[20, 21, 22, 23, 24]]),
    example(5, 6, [[11], [29, 28], [27]]),
]


def expected(teacher: Any, one: dict[str, list[int]]) -> torch.Tensor:
    """Log-probabilities before each target, from a pass over the teacher's text alone."""
    ids = torch.tensor([one["teacher_input_ids"]])
    with torch.no_grad():
        logs = teacher(input_ids=ids).logits[0].double().log_softmax(-1)
    return torch.stack([logs[i - 1] for i, x in enumerate(one["teacher_labels"]) if x >= 0])


def teacher_model() -> Any:
    return tiny_llama(VOCAB, 16, 0).eval()


def student_positions(labels: torch.Tensor) -> torch.Tensor:
    return labels[labels >= 0]


def left_padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with its padding on the left of both sides."""
    found = dict(batch)
    for side in ("", "teacher_"):
        mask = batch[f"{side}attention_mask"]
        for name in ("input_ids", "attention_mask", "shift_labels"):
            rows = batch[f"{side}{name}"]
            found[f"{side}{name}"] = torch.stack(
                [row.roll(int((1 - m).sum())) for row, m in zip(rows, mask, strict=True)]
            )
        positions = (found[f"{side}attention_mask"].cumsum(-1) - 1).clamp(min=0)
        found[f"{side}position_ids"] = positions
    del found["labels"]
    return found


@pytest.mark.parametrize("padding", ["right", "left", "packed"])
@pytest.mark.parametrize("splits", [True, False])
def test_live_teacher_gives_its_own_distribution_before_each_target(
    padding: str, splits: bool
) -> None:
    model = teacher_model()
    split = find_split(model) if splits else HeadSplit(reason="for the test")
    one = list(EXAMPLES)
    wanted = [expected(model, row) for row in one]
    teacher = FrozenTeacher(model, split)
    if padding == "packed":
        rows: Any = one
        batch = Collator(0)([pack(rows, 64)[0]])
        order = [2, 0, 1]
        lengths = [len(row["input_ids"]) for row in one]
        order = sorted(range(3), key=lambda number: -lengths[number])
        wanted = [torch.cat([wanted[number] for number in order])]
    else:
        batch = Collator(0)(one)
        if padding == "left":
            batch = left_padded(batch)
    source = source_of(teacher, batch)
    labels = batch["shift_labels"]
    assert source.leading_shape == labels.shape
    for row, there in enumerate(wanted):
        logits = source.hidden[row] @ source.weight.T if splits else source.values[row]
        found = logits[labels[row] >= 0].double().log_softmax(-1)
        assert torch.allclose(found, there, atol=1e-5)


def test_loss_and_gradient_are_those_of_the_two_texts() -> None:
    model, student = teacher_model(), tiny_llama(VOCAB, 16, 1)
    wanted = [expected(model, row) for row in EXAMPLES]
    values = []
    for row, there in zip(EXAMPLES, wanted, strict=True):
        logs = student(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        logs = logs.log_softmax(-1)
        own = torch.stack([logs[i - 1] for i, x in enumerate(row["labels"]) if x >= 0])
        values.append((there.exp() * (there - own)).sum())
    tokens = sum(len(there) for there in wanted)
    by_hand = torch.stack(values).sum() / tokens
    by_hand.backward()
    gradient = student.model.embed_tokens.weight.grad.clone()
    student.zero_grad()

    batch = Collator(0)(EXAMPLES)  # type: ignore[arg-type]
    teacher = FrozenTeacher(model, find_split(model))
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = kdlosses.get_loss("forward_kl")(logits, source_of(teacher, batch), batch["shift_labels"])
    loss.backward()
    assert torch.allclose(loss.double(), by_hand, atol=1e-5)
    assert torch.allclose(student.model.embed_tokens.weight.grad, gradient, atol=1e-5)


def test_compressed_teachers_are_moved_entry_by_entry() -> None:
    seen = torch.tensor([[-100, 7, 8, -100], [9, -100, -100, -100]])
    labels = torch.tensor([[7, 8], [-100, 9]])
    logs = torch.arange(8.0).view(2, 4, 1)
    indices = torch.arange(8).view(2, 4, 1)
    tail = torch.arange(8.0).view(2, 4)
    found = aligned(TopK(logs, indices, tail, VOCAB, 1.0), seen, labels)
    assert found.log_probs[..., 0].tolist() == [[1.0, 2.0], [0.0, 4.0]]
    assert found.indices[..., 0].tolist() == [[1, 2], [0, 4]]
    assert found.tail_log_prob.tolist() == [[1.0, 2.0], [0.0, 4.0]]
    drawn = aligned(Sampled(logs, indices, VOCAB, 1.0), seen, labels)
    assert drawn.indices[..., 0].tolist() == [[1, 2], [0, 4]]


@pytest.mark.parametrize("labels", [[[8, 7]], [[7, -100]], [[7, 9]]])
def test_targets_that_are_not_the_same_are_refused(labels: list[list[int]]) -> None:
    seen = torch.tensor([[-100, 7, 8]])
    source = Projected(torch.zeros(1, 3, 2), torch.zeros(VOCAB, 2))
    with pytest.raises(ValueError, match="targets of a row"):
        aligned(source, seen, torch.tensor(labels))


def test_a_teachers_prompt_without_its_targets_is_refused() -> None:
    model = teacher_model()
    batch = Collator(0)(EXAMPLES)  # type: ignore[arg-type]
    del batch["teacher_shift_labels"]
    with pytest.raises(ValueError, match="teacher_shift_labels: needed"):
        source_of(FrozenTeacher(model, find_split(model)), batch)
