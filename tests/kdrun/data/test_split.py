from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kdrun.config.data_section import DataConfig
from kdrun.data.hashes import content_hash, prompt_hash
from kdrun.data.prepare import read_rows
from kdrun.data.row_store import Rows, store_rows
from kdrun.data.rows import ChatRow, Message, Position, TextRow, load_rows
from kdrun.data.split import hold_out, shared_prompts
from kdrun.errors import InputError


def texts(*contents: str) -> Rows:
    return store_rows(
        [TextRow(text, Position("rows.txt", i)) for i, text in enumerate(contents, 1)]
    )


def test_five_percent() -> None:
    rows = texts(*(str(i) for i in range(1000)))
    train, held_out = hold_out(rows)
    assert (len(train), len(held_out)) == (950, 50)
    assert sorted([*train, *held_out], key=lambda row: row.position.number) == rows
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


class TestPrompts:
    """P12: rows that ask the same stand on one side."""

    @staticmethod
    def rows(prompts: int = 20, answers: int = 4) -> list[dict[str, str]]:
        return [
            {"prompt": f"question {i}", "response": f"answer {j}"}
            for i in range(prompts)
            for j in range(answers)
        ]

    @staticmethod
    def written(path: Path, rows: list[dict[str, Any]]) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    def test_p12_a_prompt_is_held_out_with_all_its_answers(self, tmp_path: Path) -> None:
        rows = load_rows(self.written(tmp_path / "a.jsonl", self.rows())).rows
        train, held_out = hold_out(rows)
        assert len(train) + len(held_out) == 80
        assert len(held_out) == 4
        assert len({prompt_hash(row) for row in held_out}) == 1
        assert shared_prompts(train, held_out) == 0
        assert shared_prompts(*hold_out(rows, by="content")) > 0

    def test_p12_all_before_the_last_answer_is_the_prompt(self) -> None:
        def talk(*contents: str) -> ChatRow:
            roles = ("user", "assistant") * 2
            messages = [Message(r, c) for r, c in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
            return ChatRow(tuple(messages), Position("x", 1))

        first = talk("a", "b", "c", "d")
        assert prompt_hash(first) == prompt_hash(talk("a", "b", "c", "other"))
        assert prompt_hash(first) != prompt_hash(talk("a", "other", "c", "d"))
        system = ChatRow((Message("system", "s"), *first.messages), first.position)
        assert prompt_hash(first) != prompt_hash(system)

    @pytest.mark.parametrize("source", ["train", "eval"])
    def test_p12_where_validation_and_test_are_halved(self, tmp_path: Path, source: str) -> None:
        many = self.written(tmp_path / "many.jsonl", self.rows(60))
        other = [{"prompt": f"other {i}", "response": "answer"} for i in range(9)]
        few = self.written(tmp_path / "few.jsonl", other)
        given = {"train": many} if source == "train" else {"train": few, "eval": many}
        parts = [
            read_rows(DataConfig(**given, part=part))  # type: ignore[arg-type]
            for part in ("validation", "test")
        ]
        validation, test = ({prompt_hash(row) for row in part.held_out} for part in parts)
        assert validation
        assert test
        assert not validation & test
        assert not any("flatter" in note for part in parts for note in part.notes)
        whole = read_rows(DataConfig(**given)).held_out  # type: ignore[arg-type]
        assert sum(len(part.held_out) for part in parts) == len(whole)

    def test_p12_rows_of_one_prompt_are_split_by_their_answers_and_it_is_said(
        self, tmp_path: Path
    ) -> None:
        data = self.written(tmp_path / "a.jsonl", self.rows(1, 40))
        found = read_rows(DataConfig(train=data))
        assert len(found.held_out) == 2
        (note,) = found.notes
        assert note.startswith("held-out rows: 2 of 2 have the same prompt as a training row")

    def test_p12_held_out_rows_of_a_file_of_their_own(self, tmp_path: Path) -> None:
        train = self.written(tmp_path / "a.jsonl", self.rows(3))
        held_out = self.written(
            tmp_path / "b.jsonl",
            [
                {"prompt": "question 1", "response": "new"},
                {"prompt": "new", "response": "answer 1"},
            ],
        )
        (note,) = read_rows(DataConfig(train=train, eval=held_out)).notes
        assert note.startswith("held-out rows: 1 of 2 have the same prompt as a training row")

    def test_f31_halves_of_one_row_are_refused_by_name(self, tmp_path: Path) -> None:
        train = self.written(tmp_path / "a.jsonl", self.rows(3))
        one = self.written(tmp_path / "eval.jsonl", [{"prompt": "new", "response": "b"}] * 2)
        with pytest.raises(InputError, match=r"eval\.jsonl: data\.part=validation takes half"):
            read_rows(DataConfig(train=train, eval=one, part="validation"))
