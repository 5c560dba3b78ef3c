"""What a served teacher gives is what the live one has, in every shape of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pair_configs import config_of
from pretend import Pretend
from torch import Tensor

from kdlosses import Projected, TopK
from kdrun.data.collate import IGNORE_INDEX, shift_labels
from kdrun.served.probe import open_served
from kdrun.served.teacher import Ahead, ServedTeacher

K = 8


def opened(server: Pretend, pair: Any, form: str, **given: Any) -> ServedTeacher:
    options = {"served__form": form, "served__top_k": K, "served__folder": str(server.states)}
    options |= {"model__teacher": server.address, **given}
    config = config_of(pair, **options)
    tokenizer, size = server.model.tokenizer, server.model.size
    rows = [tokenizer("the user asks")["input_ids"]]
    temperature = config.loss.temperature
    return open_served(
        config.model, config.served, tokenizer, size, rows, 128, temperature, 1, lambda line: None
    )


@pytest.fixture(params=["top_k", "states"])
def teacher(request: Any, server: Pretend, tiny_pair: Any) -> Iterator[ServedTeacher]:
    found = opened(server, tiny_pair, request.param)
    yield found
    found.close()


@pytest.fixture(scope="module")
def oracle(tiny_pair: Any) -> Any:
    """Logits of one example in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher, dtype=torch.float64).eval()

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
        return found

    return logits


def example(seed: int, length: int, size: int = 296) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, size, (length,), generator=draw).tolist()


def padded(rows: list[tuple[list[int], int]], left: bool) -> dict[str, Tensor]:
    """A batch of rows with the length of their prompts."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for number, (one, prompt) in enumerate(rows):
        at = length - len(one) if left else 0
        ids[number, at : at + len(one)] = torch.tensor(one)
        mask[number, at : at + len(one)] = 1
        labels[number, at + prompt : at + len(one)] = torch.tensor(one[prompt:])
    return {"input_ids": ids, "attention_mask": mask, "shift_labels": shift_labels(labels)}


def check(teacher: ServedTeacher, batch: dict[str, Tensor], expected: list[list[Tensor]]) -> None:
    """Compare a source with logits of the examples of each row, at supervised positions."""
    source = teacher.source(**batch)
    supervised = batch["shift_labels"] != IGNORE_INDEX
    logits = torch.zeros(*supervised.shape, 296, dtype=torch.float64)
    for number, parts in enumerate(expected):
        row = torch.cat(parts)
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[number].bool()
        logits[number, kept.nonzero()[: len(row), 0]] = row
    assert source.leading_shape == supervised.shape if isinstance(source, TopK) else True
    if isinstance(source, TopK):
        wanted = TopK.from_logits(logits[supervised], K)
        assert torch.equal(source.indices[supervised], wanted.indices)
        for ours, theirs in (
            (source.log_probs, wanted.log_probs),
            (source.tail_log_prob, wanted.tail_log_prob),
        ):
            assert torch.allclose(ours[supervised].double(), theirs, atol=1e-5, rtol=1e-5)
        return
    assert isinstance(source, Projected)
    found = source.hidden[supervised] @ source.weight.T
    assert torch.allclose(found.double(), logits[supervised], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side(teacher: ServedTeacher, oracle: Any, left: bool) -> None:
    rows = [(example(0, 12), 4), (example(1, 7), 1), (example(2, 20), 19)]
    check(teacher, padded(rows, left), [[oracle(ids)] for ids, _ in rows])


def test_packed_rows(teacher: ServedTeacher, oracle: Any) -> None:
    parts = [example(number, 5 + 3 * number) for number in range(3)]
    ids = torch.tensor([[token for part in parts for token in part] + [0, 0]])
    positions = [i for part in [*parts, [0, 0]] for i in range(len(part))]
    labels = ids.clone()
    starts = [0, 5, 13]
    for start in starts:
        labels[0, start : start + 2] = IGNORE_INDEX
    labels[0, -2:] = IGNORE_INDEX
    batch = {"input_ids": ids, "position_ids": torch.tensor([positions])}
    check(
        teacher,
        {**batch, "shift_labels": shift_labels(labels)},
        [[oracle(part) for part in parts]],
    )


def test_rows_without_supervised_positions_are_not_asked_for(
    teacher: ServedTeacher, oracle: Any, server: Pretend
) -> None:
    rows = [(example(0, 9), 9), (example(1, 8), 3), (example(2, 5), 5)]
    before = len(server.rows)
    check(teacher, padded(rows, False), [[oracle(ids)] for ids, _ in rows])
    assert len(server.rows) == before + 1
    empty = padded([rows[0], rows[2]], False)
    source = teacher.source(**empty)
    assert len(server.rows) == before + 1
    tensors = (source.log_probs,) if isinstance(source, TopK) else (source.hidden,)
    assert all(torch.isfinite(one).all() for one in tensors)


def test_tokens_after_the_last_supervised_position_are_not_sent(
    server: Pretend, tiny_pair: Any
) -> None:
    teacher = opened(server, tiny_pair, "top_k")
    ids = torch.tensor([example(0, 30)])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[0, 10] = ids[0, 10]
    teacher.source(ids, None, shift_labels=shift_labels(labels))
    teacher.close()
    assert [len(one) for one in server.rows] == [11]


def test_equal_rows_are_asked_for_once(
    teacher: ServedTeacher, oracle: Any, server: Pretend
) -> None:
    rows = [(example(0, 9), 3), (example(1, 8), 3), (example(0, 9), 3), (example(0, 9), 5)]
    batch = padded(rows, False)
    before = len(server.rows)
    assert teacher.expect(batch) == 4
    teacher.settle([batch])
    check(teacher, batch, [[oracle(ids)] for ids, _ in rows])
    # The last one has other supervised positions.
    assert len(server.rows) == before + 3
    assert not teacher._expected


def test_rows_of_several_batches_are_kept_for_each(
    teacher: ServedTeacher, oracle: Any, server: Pretend
) -> None:
    one, two, three = ((example(number, 9), 3) for number in range(3))
    first, second = padded([one, two, one], False), padded([two, three, two], False)
    before = len(server.rows)
    teacher.expect(first)
    teacher.expect(second)
    for batch, rows in ((first, [one, two, one]), (second, [two, three, two])):
        teacher.settle([batch])
        check(teacher, batch, [[oracle(ids)] for ids, _ in rows])
    assert len(server.rows) == before + 3
    assert not teacher._expected


def test_an_evaluation_between_steps_takes_no_answer_away(
    teacher: ServedTeacher, oracle: Any
) -> None:
    rows = [(example(number, 9), 3) for number in range(3)]
    step, later, held_out = padded(rows[:2], False), padded(rows[2:], False), padded(rows, False)
    for batch in (step, later, held_out):
        teacher.expect(batch)
    teacher.settle([step])
    check(teacher, step, [[oracle(ids)] for ids, _ in rows[:2]])
    teacher.settle(())  # as before an evaluation
    check(teacher, held_out, [[oracle(ids)] for ids, _ in rows])
    teacher.settle([later])
    check(teacher, later, [[oracle(ids)] for ids, _ in rows[2:]])
    assert not teacher._expected


def test_a_temperature_is_that_of_the_source(
    pretend: Any, tiny_pair: Any, oracle: Any, tmp_path: Path
) -> None:
    teacher = opened(pretend(softens=True), tiny_pair, "top_k", loss__temperature=2.0)
    rows = [(example(0, 12), 4)]
    batch = padded(rows, False)
    source = teacher.source(**batch)
    teacher.close()
    supervised = batch["shift_labels"] != IGNORE_INDEX
    wanted = TopK.from_logits(oracle(rows[0][0])[supervised[0]], K, 2.0)
    assert isinstance(source, TopK)
    assert source.temperature == 2.0
    assert torch.allclose(source.log_probs[supervised].double(), wanted.log_probs, atol=1e-5)


class Recorder:
    """Stands for a teacher that is asked ahead."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def expect(self, batch: Any) -> int:
        self.asked.append(batch)
        return 2


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 100])
@pytest.mark.parametrize("most", [0, 1, 4, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_ahead_gives_every_batch_once_and_asks_for_no_more_than_needed(
    rows: int, most: int, count: int
) -> None:
    teacher: Any = Recorder()
    ahead = Ahead(iter(range(count)), teacher, most, rows)
    found = []
    for batch in ahead:
        found.append(batch)
        assert teacher.asked[: len(found)] == found
        # Two rows for each batch: enough to reach the number, or what there is.
        over = len(teacher.asked) - len(found)
        assert over <= -(-rows // 2)
    assert found == list(range(count)) == teacher.asked
    early = Ahead(iter(range(count)), Recorder(), most, rows)  # type: ignore[arg-type]
    needed = [next(early, None) for _ in range(min(most, count))]
    assert needed == list(range(min(most, count)))
    assert early._teacher.asked == needed  # type: ignore[attr-defined]


def test_ahead_asks_for_nothing_while_the_teacher_is_not_needed() -> None:
    teacher: Any = Recorder()
    ahead = Ahead(iter(range(6)), teacher, 6, 4)
    ahead.asks = False
    assert [next(ahead), next(ahead)] == [0, 1]
    assert teacher.asked == []
    ahead.asks = True
    assert [*ahead] == [2, 3, 4, 5]
    assert teacher.asked == [2, 3, 4, 5]
