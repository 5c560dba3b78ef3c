"""Fields that hold no text, that nobody reads, and that say what is learned.

The letters and numbers are those under which the failures were collected.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kdrun.data.encode import encode_chats
from kdrun.data.fields import BadRowError, Fields
from kdrun.data.rows import ChatRow, RowSet, load_rows
from kdrun.errors import InputError

Load = Callable[..., RowSet]
PAIR = {"prompt": "a", "response": "b"}
USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "sat"}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Rows of the given objects, or of a file's text."""

    def load(given: list[Any] | str, name: str = "rows.jsonl", **options: Any) -> RowSet:
        path = tmp_path / name
        text = given if isinstance(given, str) else "".join(json.dumps(x) + "\n" for x in given)
        path.write_text(text, encoding="utf-8")
        return load_rows(path, **options)

    return load


def turns(row: Any) -> list[tuple[str, str]]:
    assert isinstance(row, ChatRow)
    return [(message.role, message.content) for message in row.messages]


def reasons(found: RowSet) -> dict[int, str]:
    return {bad.position.number: bad.reason for bad in found.bad}


class TestMissing:
    @pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
    @pytest.mark.parametrize("field", ["prompt", "response"])
    def test_p1_numbers_that_are_none_are_missing(self, load: Load, word: str, field: str) -> None:
        bad = json.dumps(PAIR | {field: 0}).replace(" 0", f" {word}")
        text = f"{json.dumps(PAIR)}\n{bad}\n"
        found = load(text)
        assert reasons(found) == {2: f"has the field {field!r} set to {word}"}
        (line,) = found.warnings()
        assert f"skipped 1 of 2 rows: line 2: has the field {field!r} set to {word}" in line
        with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: .* set to {word}"):
            load(text, strict=True)

    @pytest.mark.parametrize(("number", "text"), [(42, "42"), (4.5, "4.5"), (0, "0"), (-1, "-1")])
    def test_p1_a_number_is_an_answer(self, load: Load, number: float, text: str) -> None:
        (row,) = load([PAIR | {"response": number}]).rows
        assert turns(row)[1] == ("assistant", text)

    def test_p1_a_message_without_a_value_leaves_its_row_out(self, load: Load) -> None:
        talk = {"messages": [USER, ANSWER | {"content": float("nan")}]}
        found = load([{"messages": [USER, ANSWER]}, talk])
        assert reasons(found) == {2: "has an empty assistant message"}

    def test_p1_of_parquet(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        numbers = [4.5, float("nan"), float("inf"), None]
        table = pyarrow.table({"prompt": ["a"] * 4, "response": numbers})
        parquet.write_table(table, tmp_path / "rows.parquet")
        found = load_rows(tmp_path / "rows.parquet")
        assert [turns(row)[1][1] for row in found.rows] == ["4.5"]
        assert reasons(found) == {
            2: "has the field 'response' set to NaN",
            3: "has the field 'response' set to Infinity",
            4: "has the field 'response' set to null",
        }

    def test_p1_a_missing_input_or_system_prompt_is_as_an_absent_one(self, load: Load) -> None:
        row = {"instruction": "a", "input": float("nan"), "output": "b", "system": float("nan")}
        found = load([row | {"history": None}])
        assert turns(found.rows[0]) == [("user", "a"), ("assistant", "b")]
        assert not found.warnings()

    @pytest.mark.parametrize("text", ["null", "NA", "None", "nan", "NaN", "N/A", "inf"])
    @pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
    def test_p17_texts_that_look_like_missing_values_are_answers(
        self, load: Load, text: str, name: str
    ) -> None:
        csv = name.endswith("csv")
        given: Any = f"prompt,response\na,{text}\nb,\n" if csv else [PAIR | {"response": text}]
        found = load(given, name)
        assert turns(found.rows[0])[1] == ("assistant", text)
        assert reasons(found) == ({3: "has the field 'response' empty"} if csv else {})


class TestKinds:
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (datetime.date(2024, 1, 2), "a date"),
            (datetime.datetime(2024, 1, 2), "a date and time"),
            (datetime.time(1, 2), "a time"),
            (b"sat", "bytes"),
            (True, "true or false"),
            ({"a": 1}, "an object"),
            (datetime.timedelta(1), "a value of the type timedelta"),
        ],
    )
    def test_f87_what_is_no_text_is_called_what_it_is(self, value: Any, words: str) -> None:
        with pytest.raises(BadRowError, match=f"as {words}, not as text"):
            Fields({"response": value}).text("response")

    def test_f87_a_decimal_is_a_number(self) -> None:
        assert Fields({"response": Decimal("4.20")}).text("response") == "4.20"
        with pytest.raises(BadRowError, match="set to NaN"):
            Fields({"response": Decimal("NaN")}).text("response")

    def test_f37_messages_as_text(self, load: Load) -> None:
        found = load([{"messages": json.dumps([USER, ANSWER])}])
        assert turns(found.rows[0]) == turns(load([{"messages": [USER, ANSWER]}]).rows[0])
        with pytest.raises(InputError, match="has the messages in 'messages' as text that is not"):
            load([{"messages": "[{'role': 'user'}]"}])
        with pytest.raises(InputError, match="has no messages in 'messages'"):
            load([{"messages": []}])


class TestUnread:
    @pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
    def test_p2_a_system_prompt_beside_the_conversation(self, load: Load, name: str) -> None:
        talk = [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]
        found = load([{name: "the dog", "conversations": talk}])
        expected = [("system", "the dog"), ("user", "the cat"), ("assistant", "sat")]
        assert turns(found.rows[0]) == expected
        assert not found.warnings()

    def test_p2_a_system_message_in_the_conversation_wins(self, load: Load) -> None:
        own = {"role": "system", "content": "own"}
        found = load([{"system": "other", "messages": [own, USER, ANSWER]}])
        assert turns(found.rows[0])[0] == ("system", "own")
        assert found.unused == {"system": 1}

    def test_p2_history_comes_before_the_question(self, load: Load) -> None:
        row = {"instruction": "on a", "input": "", "output": "mat", "history": [["the cat", "sat"]]}
        found = load([row | {"system": "s"}])
        assert turns(found.rows[0]) == [
            ("system", "s"),
            ("user", "the cat"),
            ("assistant", "sat"),
            ("user", "on a"),
            ("assistant", "mat"),
        ]

    @pytest.mark.parametrize("history", [[["a", None]], [["a"]], "a", [["a", ""]], {"a": "b"}])
    def test_p2_history_of_another_form_leaves_the_row_out(self, load: Load, history: Any) -> None:
        found = load([PAIR, PAIR | {"history": history}])
        assert "'history'" in reasons(found)[2]
        assert len(found.rows) == 1

    def test_p2_history_that_is_null_or_empty_is_none(self, load: Load) -> None:
        found = load([PAIR | {"history": None}, PAIR | {"history": []}])
        assert [len(turns(row)) for row in found.rows] == [2, 2]
        assert not found.warnings()

    def test_p2_columns_that_are_not_read_are_named_once_with_their_share(self, load: Load) -> None:
        rows = [PAIR | {"id": 1, "score": 2}, PAIR | {"id": 2}, PAIR | {"id": 3, "score": None}]
        (line,) = load(rows).warnings()
        assert line.endswith("rows.jsonl: not used: id (all rows), score (33% of rows)")

    def test_f4_fields_of_messages_are_named_with_their_share(self, load: Load) -> None:
        plain = {"messages": [USER, ANSWER | {"logprobs": [], "refusal": None}]}
        found = load([{"messages": [USER, ANSWER | {"logprobs": [1], "refusal": "no"}]}, plain])
        (line,) = found.warnings()
        assert "not used: " in line
        assert "messages.refusal (50% of rows)" in line
        assert "messages.logprobs (50% of rows)" in line

    @pytest.mark.parametrize("role", ["image", "audio", "Video"])
    def test_f4_roles_that_cannot_be_used_leave_their_rows_out(self, load: Load, role: str) -> None:
        talk = [USER, {"role": role, "content": "4"}, ANSWER]
        found = load([{"messages": [USER, ANSWER]}, {"messages": talk}])
        assert len(found.rows) == 1
        assert f"line 2: has a message with the role '{role.lower()}'" in found.warnings()[0]
        with pytest.raises(InputError, match="none of the 1 rows can be used; line 1 has a mess"):
            load([{"messages": talk}])

    def test_f4_a_misspelt_role_ends_the_run(self, load: Load) -> None:
        odd = [USER, {"role": "asistant", "content": "sat"}]
        with pytest.raises(InputError, match=r"line 2: unknown role 'asistant'.*mean assistant\?"):
            load([{"messages": [USER, ANSWER]}, {"messages": odd}])


class TestLearned:
    def talk(self, mark: dict[str, Any], last: dict[str, Any] | None = None) -> dict[str, Any]:
        first = {"role": "assistant", "content": "a b", **mark}
        return {"messages": [USER, first, USER, ANSWER | (last or {})]}

    @pytest.mark.parametrize(
        "mark",
        [
            {"weight": 0},
            {"weight": 0.0},
            {"train": False},
            {"training": False},
            {"trainable": False},
            {"loss_mask": 0},
            {"loss": False},
        ],
    )
    def test_p3_an_answer_that_is_not_to_be_learned_stays_in_the_text_alone(
        self, load: Load, tiny_tokenizer: Any, mark: dict[str, Any]
    ) -> None:
        found = load([self.talk(mark), self.talk({})])
        assert not found.warnings()
        marked, plain = encode_chats(found.rows, tiny_tokenizer, 100).examples  # type: ignore[arg-type]
        assert marked["input_ids"] == plain["input_ids"]
        for example, expected in ((marked, "sat<|im_end|>"), (plain, "a b<|im_end|>sat<|im_end|>")):
            labels = [label for label in example["labels"] if label >= 0]
            assert tiny_tokenizer.decode(labels) == expected

    @pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"weight": None}])
    def test_p3_one_and_true_are_the_usual(self, load: Load, mark: dict[str, Any]) -> None:
        (row,) = load([self.talk(mark)]).rows
        assert isinstance(row, ChatRow)
        assert all(message.learned for message in row.messages)

    @pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": 2}, {"loss_mask": [0, 1]}])
    def test_p3_other_weights_are_refused_by_name(self, load: Load, mark: dict[str, Any]) -> None:
        found = load([self.talk({}), self.talk(mark)])
        (name,) = mark
        assert f"has {name} {mark[name]!r} in message 2" in reasons(found)[2]

    def test_p3_prompts_are_not_learned_whatever_they_say(self, load: Load) -> None:
        asked = [USER | {"trainable": False}, ANSWER]
        assert not load([{"messages": asked}]).warnings()
        asked = [USER | {"trainable": True}, ANSWER]
        (line,) = load([{"messages": asked}]).warnings()
        assert "not used: messages.trainable of the user (all rows)" in line

    def test_p3_a_row_with_nothing_left_is_left_out(self, load: Load) -> None:
        found = load([self.talk({}), self.talk({"weight": 0}, {"weight": 0})])
        assert reasons(found) == {
            2: "has no answer to learn: all are marked as not to be learned",
        }
        with pytest.raises(InputError, match="no answer to learn"):
            load([self.talk({"train": False}, {"loss": False})])
