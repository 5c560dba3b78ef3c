"""Rows in the shapes that people have: what is rendered, and which tokens are supervised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from word_chats import words
from words import CHAT, PROMPT

from kdrun.config.sections import DataConfig
from kdrun.data.chat import ChatRenderer
from kdrun.data.encode import encode_chats
from kdrun.data.encoder import Encoder
from kdrun.data.hashes import content_hash
from kdrun.data.rows import ChatRow, RowSet, load_rows
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


class TestPreferences:
    GOOD, BAD = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "the cat", "chosen": "a", "rejected": "b"},
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
            {"prompt": "the cat", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        ],
    )
    def test_the_chosen_answer_is_learned(self, load: Load, row: dict[str, Any]) -> None:
        found = load(row)
        assert found.data_format == "preference"
        assert shown(found.rows[0]) == [("user", "the cat"), ("assistant", "a")]
        assert found.warnings() == [
            f"{found.source}: preference rows: the chosen answers are learned"
        ]

    def test_no_prompt(self, load: Load) -> None:
        with pytest.raises(InputError, match="has an answer that was chosen, but no prompt"):
            load({"chosen": "a", "rejected": "b"})


def test_several_answers_are_several_rows(load: Load) -> None:
    found = load(
        {"question": "the cat", "answers": ["a", "b"]}, {"question": "c", "answers": ["d"]}
    )
    assert [shown(row) for row in found.rows] == [
        [("user", "the cat"), ("assistant", "a")],
        [("user", "the cat"), ("assistant", "b")],
        [("user", "c"), ("assistant", "d")],
    ]


def test_a_problem_has_a_solution_whatever_else_there_is(load: Load) -> None:
    found = load({"problem": "the cat", "solution": "a b", "answer": "b"})
    assert shown(found.rows[0]) == [("user", "the cat"), ("assistant", "a b")]
    assert "not used: answer" in found.warnings()[0]


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
