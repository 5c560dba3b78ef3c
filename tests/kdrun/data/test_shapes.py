"""Rows in the shapes that people have: what is rendered, and which tokens are supervised."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from word_chats import words
from words import CHAT, PROMPT

from kdrun.config.data_section import DataConfig
from kdrun.data.chat import ChatRenderer
from kdrun.data.encode import encode_chats
from kdrun.data.encoder import Encoder
from kdrun.data.hashes import content_hash
from kdrun.data.prepare import read_rows
from kdrun.data.rows import ChatRow, RowSet, SourceOf, load_rows, load_sources
from kdrun.data.templates import Rendering
from kdrun.errors import InputError

USER = {"role": "user", "content": "the cat"}
ANSWER = {"role": "assistant", "content": "sat on"}
CALL = {"type": "function", "function": {"name": "mat", "arguments": '{"a": "b"}'}}
TOOLS = [{"type": "function", "function": {"name": "mat", "parameters": {}}}]
# As those of Qwen and Hermes: tools first, calls in the assistant's turn, results as another's.
WITH_TOOLS = (
    "{% if tools %}system {% for t in tools %}{{ t['function']['name'] }} {% endfor %}<end> "
    "{% endif %}{% for m in messages %}{{ m['role'] }} {{ m['content'] or '' }} "
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} "
    "{% for k, v in c['function']['arguments'].items() %}{{ k }} {{ v }} {% endfor %}</call> "
    "{% endfor %}<end> {% endfor %}" + PROMPT
)
THINKS = (
    "{% for m in messages %}{{ m['role'] }} {% if m['reasoning_content'] %}<think> "
    "{{ m['reasoning_content'] }} </think> {% endif %}{{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
Load = Callable[..., RowSet]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def read(*rows: Any, **options: Any) -> RowSet:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_rows(file, **options)

    return read


def read(
    tokenizer: Any, found: RowSet, rendering: Rendering | None = None
) -> list[tuple[str, str]]:
    """All tokens of each row, and those that are supervised."""
    rows: Any = found.rows
    examples = encode_chats(rows, tokenizer, 100, rendering=rendering or Rendering()).examples
    texts = []
    for one in examples:
        targets = [label for label in one["labels"] if label >= 0]
        both = (one["input_ids"], targets)
        texts.append(tuple(" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in both))
    return texts  # type: ignore[return-value]


def shown(row: Any) -> list[tuple[str, str]]:
    assert isinstance(row, ChatRow)
    return [(message.role, message.content) for message in row.messages]


class TestTools:
    TALK = {  # noqa: RUF012 - not changed
        "tools": TOOLS,
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "dog", "tool_call_id": "1"},
            ANSWER,
        ],
    }

    def test_calls_are_supervised_and_results_are_not(self, load: Load) -> None:
        (found,) = read(words(WITH_TOOLS), load(self.TALK))
        assert found == (
            "system mat <end> user the cat <end> assistant mat a b </call> <end> <unk> dog <end> "
            "assistant sat on <end>",  # tool is not among the words
            "mat a b </call> <end> sat on <end>",
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"function": {"name": "mat", "arguments": {"a": "b"}}},
            {"name": "mat", "arguments": {"a": "b"}},
            {"name": "mat", "parameters": {"a": "b"}},
        ],
    )
    def test_forms_of_a_call(self, load: Load, change: dict[str, Any]) -> None:
        talk = json.loads(json.dumps(self.TALK))
        talk["messages"][1]["tool_calls"] = [change]
        assert read(words(WITH_TOOLS), load(talk)) == read(words(WITH_TOOLS), load(self.TALK))

    def test_roles_of_other_formats(self, load: Load) -> None:
        talk = [
            {"from": "human", "value": "the cat"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "mat", "arguments": {"a": "b"}}),
            },
            {"from": "observation", "value": "dog"},
            {"from": "gpt", "value": "sat on"},
        ]
        row = {"conversations": talk, "tools": json.dumps([TOOLS[0]["function"]])}
        assert read(words(WITH_TOOLS), load(row)) == read(words(WITH_TOOLS), load(self.TALK))

    def test_the_old_form_of_one_call(self, load: Load) -> None:
        talk = json.loads(json.dumps(self.TALK))
        talk["messages"][1] = {
            "role": "assistant",
            "content": "",
            "function_call": CALL["function"],
        }
        assert read(words(WITH_TOOLS), load(talk)) == read(words(WITH_TOOLS), load(self.TALK))

    def test_a_template_that_writes_neither_is_told(self, load: Load) -> None:
        talk = json.loads(json.dumps(self.TALK))
        talk["messages"][1]["content"] = "a"
        rows: Any = load(talk).rows
        lost = encode_chats(rows, words(CHAT), 100).report.lost
        assert set(lost) == {"a tool call", "the tools"}

    def test_a_call_that_is_not_written_is_not_learned_as_an_empty_answer(self, load: Load) -> None:
        assert read(words(CHAT), load(self.TALK))[0][1] == "sat on <end>"
        rows: Any = load({"messages": self.TALK["messages"][:2]}).rows
        with pytest.raises(InputError, match="has a tool call that the chat template omits"):
            encode_chats(rows, words(CHAT), 100)

    def test_without_a_template_tools_and_calls_are_json(self, load: Load) -> None:
        tokenizer = words(None)
        talk = {"tools": TOOLS, "messages": self.TALK["messages"][:2]}
        rows: Any = load(talk).rows
        text = ChatRenderer(tokenizer).offering(rows[0].tools).render(rows[0].messages)
        assert text == (
            '[{"type": "function", "function": {"name": "mat", "parameters": {}}}]\nthe cat\n'
            '{"name": "mat", "arguments": {"a": "b"}}<eos>'
        )

    def test_fields_that_tables_fill_with_null_are_absent(self, load: Load) -> None:
        talk = json.loads(json.dumps(self.TALK))
        talk["tools"][0]["function"]["parameters"] = {"a": {"type": "string", "enum": None}}
        call = {"id": None, "function": {"name": "mat", "arguments": {"a": "b", "c": None}}}
        talk["messages"][1]["tool_calls"] = [call]
        (row,) = load(talk).rows
        assert isinstance(row, ChatRow)
        assert row.tools is not None
        assert row.tools[0]["function"]["parameters"] == {"a": {"type": "string"}}
        (found,) = row.messages[1].tool_calls
        assert found == {"type": "function", "function": {"name": "mat", "arguments": {"a": "b"}}}

    def test_a_call_without_a_name_skips_the_row(self, load: Load) -> None:
        talk = json.loads(json.dumps(self.TALK))
        talk["messages"][1]["tool_calls"] = [{"function": {"arguments": "{}"}}]
        (bad,) = load(self.TALK, talk).bad
        assert (bad.position.number, bad.reason) == (
            2,
            "has a tool call without a name in message 2",
        )

    def test_what_a_row_calls_and_offers_is_part_of_its_content(self, load: Load) -> None:
        other = json.loads(json.dumps(self.TALK))
        other["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": "c"}'
        without = {"messages": self.TALK["messages"]}
        rows = load(self.TALK, other, without).rows
        assert len({content_hash(row) for row in rows}) == 3


def test_a_developer_is_the_system_where_the_template_knows_none(load: Load) -> None:
    found = load({"messages": [{"role": "developer", "content": "dog"}, USER, ANSWER]})
    assert read(words(CHAT), found)[0][0].startswith("system dog <end> user")
    knows = "{# developer #}" + CHAT
    assert read(words(knows), found)[0][0].startswith("<unk> dog <end> user")  # not in the words


class TestConversationalPrompts:
    def test_prompt_and_completion_as_messages(self, load: Load) -> None:
        found = load({"prompt": [USER], "completion": [ANSWER]})
        assert shown(found.rows[0]) == [("user", "the cat"), ("assistant", "sat on")]
        assert not found.warnings()

    def test_with_an_earlier_turn_and_an_answer_as_text(self, load: Load) -> None:
        found = load({"prompt": [USER, ANSWER, USER], "response": "a b"})
        roles = [role for role, _ in shown(found.rows[0])]
        assert roles == ["user", "assistant", "user", "assistant"]
        assert shown(found.rows[0])[-1] == ("assistant", "a b")

    def test_both_as_json_text(self, load: Load) -> None:
        found = load({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])})
        assert shown(found.rows[0]) == [("user", "the cat"), ("assistant", "sat on")]

    def test_messages_with_several_texts(self, load: Load) -> None:
        found = load({"prompt": [USER], "response": ["a", "b"]})
        assert [shown(row)[1] for row in found.rows] == [("assistant", "a"), ("assistant", "b")]

    def test_what_is_marked_as_bad_is_not_learned(self, load: Load) -> None:
        good, bad = ({"prompt": "a", "completion": c, "label": c == "b"} for c in "bc")
        found = load(good, bad)
        assert [shown(row)[1] for row in found.rows] == [("assistant", "b")]
        assert found.bad[0].reason == "has a completion that is marked as bad (label: false)"


class TestPreferences:
    GOOD, BAD = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    SYSTEM = {"role": "system", "content": "dog"}  # noqa: RUF012 - not changed

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "the cat", "chosen": "a", "rejected": "b"},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": "the cat", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"prompt": "the cat", "chosen": GOOD, "rejected": BAD},
            {"prompt": "the cat", "chosen": "the cat a", "rejected": "the cat b"},
            {
                "conversations": [{"from": "human", "value": "the cat"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            {
                "prompt": "the cat",
                "messages": [USER, GOOD],
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
            },
            {
                "chosen": "\n\nHuman: the cat\n\nAssistant: a",
                "rejected": "\n\nHuman: the cat\n\nAssistant: b",
            },
        ],
        ids=[
            "texts",
            "messages",
            "repeated",
            "whole",
            "objects",
            "texts repeated",
            "ShareGPT",
            "UltraFeedback",
            "transcript",
        ],
    )
    def test_the_chosen_answer_is_learned(self, load: Load, row: dict[str, Any]) -> None:
        found = load(row, row)
        assert found.data_format == "preference"
        assert shown(found.rows[0]) == [("user", "the cat"), ("assistant", "a")]
        assert found.warnings() == [
            f"{found.source}: 2 of 2 rows: preferences: 'chosen' is learned, 'rejected' is not"
        ]

    def test_a_system_prompt_that_is_not_repeated_stays(self, load: Load) -> None:
        rows = [USER, self.GOOD], [USER, self.BAD]
        found = load({"prompt": [self.SYSTEM, USER], "chosen": rows[0], "rejected": rows[1]})
        assert [role for role, _ in shown(found.rows[0])] == ["system", "user", "assistant"]

    def test_a_chosen_answer_of_several_messages(self, load: Load) -> None:
        calls = {"role": "assistant", "tool_calls": [CALL]}
        chosen = [calls, {"role": "tool", "content": "c"}, self.GOOD]
        found = load({"prompt": "the cat", "chosen": chosen, "rejected": [self.BAD]})
        assert [role for role, _ in shown(found.rows[0])] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]

    def test_an_answer_that_only_begins_as_the_prompt_stays_whole(self, load: Load) -> None:
        found = load({"prompt": "the", "chosen": "the cat", "rejected": "a dog"})
        assert shown(found.rows[0])[1] == ("assistant", "the cat")

    def test_no_prompt(self, load: Load) -> None:
        with pytest.raises(InputError, match="has an answer that was chosen, but no prompt"):
            load({"chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"prompt": "c", "response": ["a", "a", ""]}, ["a"]),
        ({"prompt": "c", "responses": ["a", "b"]}, ["a", "b"]),
        ({"prompt": "c", "completions": ["a", "b"]}, ["a", "b"]),
        ({"instruction": "c", "input": "", "output": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_answers_as_lists(load: Load, row: dict[str, Any], answers: list[str]) -> None:
    found = load(row)
    assert [shown(one) for one in found.rows] == [
        [("user", "c"), ("assistant", answer)] for answer in answers
    ]
    assert len(found.warnings()) == (len(answers) > 1)


def test_a_list_of_something_else_skips_the_row(load: Load) -> None:
    found = load({"prompt": "c", "response": "a"}, {"prompt": "c", "response": [4]})
    assert [bad.reason for bad in found.bad] == ["has a number in the list 'response', not text"]


def test_several_answers_are_several_rows(load: Load) -> None:
    found = load(
        {"question": "the cat", "answers": ["a", "b"]}, {"question": "c", "answers": ["d"]}
    )
    assert [shown(row) for row in found.rows] == [
        [("user", "the cat"), ("assistant", "a")],
        [("user", "the cat"), ("assistant", "b")],
        [("user", "c"), ("assistant", "d")],
    ]
    (line,) = found.warnings()
    assert line.endswith("1 of 2 rows: several answers in 'answers', each of which is a row")


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"problem": "the cat", "solution": "a b", "answer": "b"}, "answer"),
        ({"source": "c", "problem": "the cat", "solution": "a b"}, "source"),
        ({"question": "the cat", "solution": "a b", "answer": "b"}, "answer"),
        (
            {"problem": "the cat", "generated_solution": "a b", "expected_answer": "b"},
            "expected_an",
        ),
    ],
)
def test_a_problem_has_a_solution_whatever_else_there_is(
    load: Load, row: dict[str, str], unused: str
) -> None:
    found = load(row)
    assert shown(found.rows[0]) == [("user", "the cat"), ("assistant", "a b")]
    assert f"not used: {unused}" in found.warnings()[0]


class TestSkipped:
    GOOD = {"messages": [USER, ANSWER]}  # noqa: RUF012 - not changed

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (
                {"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]},
                "has a message with a part of the type 'image_url'",
            ),
            (
                {"messages": [USER | {"content": ["a"]}, ANSWER]},
                "has a message with a part that is",
            ),
            ({"messages": [USER, {"role": "audio", "content": "a"}, ANSWER]}, "the role 'audio'"),
            (GOOD | {"images": ["a.png"]}, "has 'images', which kdrun does not learn from"),
        ],
    )
    def test_pictures_and_sound(self, load: Load, row: dict[str, Any], reason: str) -> None:
        found = load(self.GOOD, row)
        assert len(found.rows) == 1
        assert found.bad[0].position.number == 2
        assert reason in found.bad[0].reason

    def test_no_pictures_are_none(self, load: Load) -> None:
        assert len(load(self.GOOD, self.GOOD | {"images": [], "audio": None}).rows) == 2


class TestPrompts:
    """For procedures that write every answer."""

    def read(self, tmp_path: Path, *rows: Any) -> RowSet:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_sources([SourceOf(str(file), prompts=True)])

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "the cat"},
            {"prompt": [USER]},
            {"messages": [USER]},
            {"messages": json.dumps([USER])},
            {"instruction": "the", "input": "cat"},
        ],
    )
    def test_shapes(self, tmp_path: Path, row: dict[str, Any]) -> None:
        found = self.read(tmp_path, row | {"system": "dog"})
        assert found.unanswered == 1
        assert [role for role, _ in shown(found.rows[0])] == ["system", "user", "assistant"]
        assert shown(found.rows[0])[1][1].split() == ["the", "cat"]
        assert shown(found.rows[0])[2][1] == ""

    def test_a_conversation_that_ends_with_a_question(self, tmp_path: Path) -> None:
        found = self.read(
            tmp_path, {"messages": [USER, ANSWER, USER]}, {"messages": [USER, ANSWER]}
        )
        assert [len(shown(row)) for row in found.rows] == [4, 2]
        assert found.unanswered == 1

    def test_what_is_held_out_has_answers(self, tmp_path: Path) -> None:
        file, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
        answered = [{"messages": [{**USER, "content": word}, ANSWER]} for word in "abcd"]
        for path, rows in ((file, [{"messages": [USER]}, *answered]), (other, answered)):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig(train=str(file), cache_dir="none")
        found = read_rows(data, prompts=True)
        assert len(found.train) + len(found.held_out) == 4
        assert "line 1: has no assistant answer" in found.notes[0]
        found = read_rows(data.model_copy(update={"eval": str(other)}), prompts=True)
        assert len(found.train) == 5
        assert "1 of 5 rows: prompts without answers, which the procedure" in found.notes[0]

    @pytest.mark.parametrize("row", [{"prompt": "the cat"}, {"messages": [USER]}])
    def test_others_are_told_which_procedures_take_them(
        self, load: Load, row: dict[str, Any]
    ) -> None:
        with pytest.raises(InputError, match=r"prompts but no answers.*gkd:lambda=1 or seqkd"):
            load(row)


class TestReasoning:
    @pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
    def test_it_reaches_a_template_that_reads_it(self, load: Load, name: str) -> None:
        found = load({"messages": [USER, ANSWER | {name: "a b"}]})
        assert not found.warnings()
        assert read(words(THINKS), found) == [
            (
                "user the cat <end> assistant <think> a b </think> sat on <end>",
                "<think> a b </think> sat on <end>",
            )
        ]

    def test_beside_a_prompt_and_its_answer(self, load: Load) -> None:
        found = load({"question": "the cat", "answer": "sat on", "reasoning_content": "a b"})
        assert not found.warnings()
        assert read(words(THINKS), found)[0][1] == "<think> a b </think> sat on <end>"

    def test_as_a_part_of_the_answer(self, load: Load) -> None:
        parts = [{"type": "thinking", "thinking": "a b"}, {"type": "text", "text": "sat on"}]
        found = load({"messages": [USER, {"role": "assistant", "content": parts}]})
        assert read(words(THINKS), found)[0][1] == "<think> a b </think> sat on <end>"

    def test_it_stands_in_the_text_for_another(self, load: Load) -> None:
        found = load({"messages": [USER, ANSWER | {"reasoning": "a b"}]})
        assert read(words(CHAT), found)[0][1] == "<think> a b </think> sat on <end>"

    @pytest.mark.parametrize(
        "answer",
        [ANSWER | {"reasoning": "a b"}, {**ANSWER, "content": "<think> a b </think> sat on"}],
    )
    def test_it_can_be_left_out(self, load: Load, answer: dict[str, str]) -> None:
        found = load({"messages": [USER, answer]})
        for template in (CHAT, THINKS):
            rendering = Rendering(reasoning="drop")
            assert read(words(template), found, rendering)[0][1] == "sat on <end>"

    def test_it_is_counted(self, load: Load) -> None:
        rows = load(
            {"messages": [USER, ANSWER | {"reasoning": "a b"}]}, {"messages": [USER, ANSWER]}
        )
        for policy, said in (("keep", "learned"), ("drop", "left out")):
            encoder = Encoder(words(THINKS), 100, rendering=Rendering(reasoning=policy))  # type: ignore[arg-type]
            notes = encoder(rows.rows, 0, False, "training").notes
            assert any(f"1 of 2 rows have reasoning, which is {said}" in note for note in notes)


def test_only_the_last_answer_is_supervised_where_that_is_asked_for(load: Load) -> None:
    found = load({"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "a"}]})
    assert read(words(CHAT), found)[0][1] == "sat on <end> a <end>"
    assert read(words(CHAT), found, Rendering(supervise="last"))[0][1] == "a <end>"


class TestTemplates:
    def test_another_template_and_its_variables(self, load: Load, tmp_path: Path) -> None:
        file = tmp_path / "chat.jinja"
        file.write_text("{{ word }} " + CHAT)
        tokenizer = words(CHAT)
        data = DataConfig(template=str(file), template_arguments={"word": "dog"})
        encoder = Encoder.of(data, tokenizer, {})
        assert tokenizer.chat_template == "{{ word }} " + CHAT  # so that it is saved
        (found,) = read(tokenizer, load({"messages": [USER, ANSWER]}), encoder.rendering)
        assert found[0] == "dog user the cat <end> assistant sat on <end>"

    def test_one_that_needs_its_variables_is_tried_with_them(self, tmp_path: Path) -> None:
        file = tmp_path / "chat.jinja"
        file.write_text("{{ style.tone }} " + CHAT)
        Encoder.of(
            DataConfig(template=str(file), template_arguments={"style": {"tone": "dog"}}),
            words(CHAT),
            {},
        )
        with pytest.raises(InputError, match=r"fails on a question with an answer .*'style'"):
            Encoder.of(DataConfig(template=str(file)), words(CHAT), {})

    def test_variables_do_not_replace_what_is_set_for_every_row(self) -> None:
        named = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
        assert "documents" in named
        assert "chat_template" in named
        for name in {"messages", *named} - {"documents", "kwargs"}:
            with pytest.raises(ValueError, match=f"{name} is set for every row; remove it"):
                DataConfig(template_arguments={name: True})
        assert DataConfig(template_arguments={"documents": []}).template_arguments

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("a\n{% for m in messages %}\n{{ m }", r"chat.jinja, line 3: "),
            ("{{ raise_exception('no') }}", r"fails on a question with an answer \(no\)"),
        ],
    )
    def test_a_broken_one_is_one_line(self, tmp_path: Path, text: str, line: str) -> None:
        file = tmp_path / "chat.jinja"
        file.write_text(text)
        with pytest.raises(InputError, match=line):
            Encoder.of(DataConfig(template=str(file)), words(CHAT), {})
        with pytest.raises(InputError, match=r"none\.jinja: cannot be read"):
            Encoder.of(DataConfig(template=str(tmp_path / "none.jinja")), words(CHAT), {})


class TestForms:
    def test_arguments_are_text_where_the_template_adds_them_to_text(self, load: Load) -> None:
        adds = WITH_TOOLS.replace(
            "{% for k, v in c['function']['arguments'].items() %}{{ k }} {{ v }} {% endfor %}",
            "{{ c['function']['arguments'] + ' c ' }}",
        )
        talk = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
        rows: Any = load(talk).rows
        text = ChatRenderer(words(adds)).render(rows[0].messages)
        assert text.startswith('user the cat <end> assistant  mat {"a": "b"} c </call> <end>')

    def test_a_result_that_is_written_as_json_is_not_lost(self, load: Load) -> None:
        talk = json.loads(json.dumps(TestTools.TALK))
        talk["messages"][2]["content"] = '"a" dog'
        escapes = WITH_TOOLS.replace(
            "m['content'] or ''",
            "(m['content'] | tojson) if m['role'] == 'tool' else m['content'] or ''",
        )
        rows: Any = load(talk).rows
        assert not encode_chats(rows, words(escapes), 100).report.lost

    def test_a_result_inside_of_an_answer_skips_the_row(self, load: Load) -> None:
        joins = (
            "{% for m in messages %}{% if m['role'] == 'tool' %}{% else %}{{ m['role'] }} "
            "{% if loop.previtem and loop.previtem['role'] == 'tool' %}"
            "{{ loop.previtem['content'] }} {% endif %}"
            "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} {% endfor %}"
            "{{ m['content'] or '' }} <end> {% endif %}{% endfor %}" + PROMPT
        )
        rows: Any = load(TestTools.TALK, {"messages": [USER, ANSWER]}).rows
        report = encode_chats(rows, words(joins), 100).report
        assert [(bad.position.number, bad.reason) for bad in report.skipped] == [
            (1, "has a tool result that the chat template writes in an answer")
        ]

    def test_generation_blocks_are_given_tools_and_no_reasoning_that_is_dropped(
        self, load: Load
    ) -> None:
        blocks = (
            "{{ messages | length }} {% for t in tools or [] %}{{ t['function']['name'] }} "
            "{% endfor %}{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
            "{% generation %}{{ m['content'] }} <end>{% endgeneration %}{% else %}"
            "{{ m['content'] }}{% endif %} {% endfor %}"
        )
        row = {"tools": TOOLS, "messages": [USER, ANSWER | {"reasoning": "a b"}]}
        for policy, expected in (
            ("keep", "<think> a b </think> sat on <end>"),
            ("drop", "sat on <end>"),
        ):
            rendering = Rendering(reasoning=policy)  # type: ignore[arg-type]
            ((text, supervised),) = read(words(blocks), load(row), rendering)
            assert text.split()[:3] == ["<unk>", "mat", "user"]
            assert supervised == expected

    @pytest.mark.parametrize("content", ["a b </think> sat on", "<think></think> sat on"])
    def test_reasoning_whose_beginning_is_in_the_prompt_can_be_left_out(
        self, load: Load, content: str
    ) -> None:
        found = load({"messages": [USER, ANSWER | {"content": content}]})
        assert read(words(CHAT), found, Rendering(reasoning="drop"))[0][1] == "sat on <end>"

    def test_an_answer_of_reasoning_alone_is_skipped_where_that_is_dropped(
        self, load: Load
    ) -> None:
        thought = {"role": "assistant", "content": "<think> a </think>"}
        rows: Any = load({"messages": [USER, ANSWER]}, {"messages": [USER, thought]}).rows
        report = encode_chats(rows, words(CHAT), 100, rendering=Rendering(reasoning="drop")).report
        assert [(bad.position.number, bad.reason) for bad in report.skipped] == [
            (2, "has an answer of reasoning alone, which data.reasoning=drop removes")
        ]
