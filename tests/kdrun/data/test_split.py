from __future__ import annotations

import random
from pathlib import Path

import pytest

from kdrun.data.rows import ChatRow, Message, Position, TextRow, load_rows
from kdrun.data.split import content_hash, hold_out
from kdrun.errors import InputError


def texts(*contents: str) -> list[TextRow]:
    return [TextRow(text, Position("rows.txt", i)) for i, text in enumerate(contents, 1)]


def test_five_percent() -> None:
    rows = texts(*(str(i) for i in range(1000)))
    train, held_out = hold_out(rows)
    assert (len(train), len(held_out)) == (950, 50)
    assert sorted(train + held_out, key=lambda row: row.position.number) == rows
    for part in (train, held_out):
        assert part == sorted(part, key=lambda row: row.position.number)


def test_order_and_place_have_no_say() -> None:
    contents = [str(i) for i in range(200)]
    _, expected = hold_out(texts(*contents))
    random.Random(0).shuffle(contents)
    _, held_out = hold_out(texts(*contents))
    assert {row.text for row in held_out} == {row.text for row in expected}


def test_most_held_out_rows_stay_when_the_data_grows() -> None:
    contents = [str(i) for i in range(1000)]
    before = {row.text for row in hold_out(texts(*contents))[1]}
    after = {row.text for row in hold_out(texts(*contents, *map(str, range(1000, 1100))))[1]}
    assert len(before & after) >= 45


def test_equal_rows_stay_together() -> None:
    rows = texts(*(str(i % 40) for i in range(400)))
    train, held_out = hold_out(rows)
    assert not {row.text for row in train} & {row.text for row in held_out}
    assert len(held_out) == 20


def test_at_least_one_on_each_side() -> None:
    assert [len(part) for part in hold_out(texts("a", "b"))] == [1, 1]
    assert [len(part) for part in hold_out(texts("a", "b"), fraction=1.0)] == [1, 1]


@pytest.mark.parametrize("contents", [(), ("a",), ("a", "a", "a")])
def test_too_few_different_rows(contents: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="two different rows"):
        hold_out(texts(*contents))


def test_the_hash_is_of_the_content() -> None:
    a = ChatRow((Message("user", "a"), Message("assistant", "b")), Position("x", 1))
    b = ChatRow((Message("user", "a"), Message("assistant", "b")), Position("y", 2, "row"))
    c = ChatRow((Message("user", "ab"), Message("assistant", "")), Position("x", 1))
    assert content_hash(a) == content_hash(b) != content_hash(c)


def test_real_rows(shared_data: Path) -> None:
    train, held_out = hold_out(load_rows(shared_data / "alpaca_en_demo.json").rows)
    assert (len(train), len(held_out)) == (949, 50)
