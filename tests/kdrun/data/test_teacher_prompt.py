"""What the teacher reads: conversations from fields, and examples whose answers it shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from word_chats import words
from words import CHAT

from kdrun.data.collate import Collator
from kdrun.data.encode import encode
from kdrun.data.pack import pack
from kdrun.data.rows import ChatRow, Message, Position, SourceOf, load_sources
from kdrun.data.teacher_prompt import TeacherPrompt
from kdrun.data.templates import Rendering
from kdrun.data.view import View
from kdrun.errors import InputError


def seen_in(folder: Path, record: dict[str, Any], sees: TeacherPrompt) -> list[tuple[str, str]]:
    """Roles and contents of what the teacher reads of one record."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = load_sources([SourceOf(str(path), teacher=sees)]).rows
    assert isinstance(row, ChatRow)
    return [(message.role, message.content) for message in row.teacher or ()]


PLAIN = {"prompt": "2+2?", "response": "4", "solution": "two and two", "long": "add 2 and 2"}


def test_the_teacher_reads_another_prompt_a_template_or_another_system_prompt(
    tmp_path: Path,
) -> None:
    whole = TeacherPrompt(prompt_field="long")
    assert seen_in(tmp_path, PLAIN, whole) == [("user", "add 2 and 2"), ("assistant", "4")]
    around = TeacherPrompt(context_field="solution", template="{prompt} ({context}, {x}, {answer})")
    assert seen_in(tmp_path, PLAIN, around) == [
        ("user", "2+2? (two and two, {x}, 4)"),
        ("assistant", "4"),
    ]
    record = {**PLAIN, "system": "be brief"}
    system = TeacherPrompt(system="be right")
    assert seen_in(tmp_path, record, system)[:2] == [("system", "be right"), ("user", "2+2?")]


def test_in_several_turns_the_template_goes_around_the_question_of_the_first_learned_answer(
    tmp_path: Path,
) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    sees = TeacherPrompt(template="hint {prompt}")
    found = seen_in(tmp_path, {"messages": messages}, sees)
    assert [text for _, text in found] == ["hint a", "b", "c", "d"]
    last = TeacherPrompt(template="hint {prompt}", last_only=True)
    assert [t for _, t in seen_in(tmp_path, {"messages": messages}, last)] == [
        *"ab",
        "hint c",
        "d",
    ]
    messages[1]["weight"] = 0  # type: ignore[assignment]
    found = seen_in(tmp_path, {"messages": messages}, sees)
    assert [text for _, text in found] == ["a", "b", "hint c", "d"]


def test_messages_for_the_teacher_may_leave_the_last_answer_out_and_have_earlier_ones(
    tmp_path: Path,
) -> None:
    def talk(*texts: str) -> list[dict[str, str]]:
        roles = ("user", "assistant") * len(texts)
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    record = {"messages": talk("q", "answer"), "teacher_messages": talk("ex", "done", "q")}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    (row,) = load_sources([SourceOf(str(path))]).rows
    assert isinstance(row, ChatRow)
    assert row.teacher is not None
    assert [(m.content, m.learned) for m in row.teacher if m.role == "assistant"] == [
        ("done", False),
        ("answer", True),
    ]
    record["teacher_messages"] = talk("q", "another answer")
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1 has messages for the teacher in which an answer"):
        load_sources([SourceOf(str(path))])
    with pytest.raises(InputError, match="line 1: the row has 'teacher_messages'; remove data"):
        load_sources([SourceOf(str(path), teacher=TeacherPrompt(template="{prompt}!"))])


def test_a_field_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row has the field 'solutoin'.*mean solution"):
        seen_in(tmp_path, PLAIN, TeacherPrompt(context_field="solutoin", template="{context}"))


A, B, C = "the cat sat", "the dog", "on a mat"


def conversation(*texts: str, teacher: tuple[str, ...] = ()) -> ChatRow:
    def messages(of: tuple[str, ...]) -> tuple[Message, ...]:
        roles: Any = ("user", "assistant") * len(of)
        return tuple(Message(r, t) for r, t in zip(roles, of, strict=False))

    return ChatRow(messages(texts), Position("r", 1), None, messages(teacher) or None)


def sides(example: Any, tokenizer: Any) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """For each side, its targets with the token before each, as words."""

    def pairs(ids: list[int], labels: list[int]) -> list[tuple[str, str]]:
        names = tokenizer.convert_ids_to_tokens(ids)
        return [(names[i - 1], names[i]) for i in range(len(ids)) if labels[i] >= 0]

    return (
        pairs(example["input_ids"], example["labels"]),
        pairs(example["teacher_input_ids"], example["teacher_labels"]),
    )


def test_both_sides_have_the_same_targets_after_prompts_of_different_lengths() -> None:
    tokenizer = words(CHAT)
    row = conversation("the", A, "on", B, teacher=("the dog sat on a mat the", A, "on a", B))
    (example,) = encode([row], tokenizer, 100).examples
    own, seen = sides(example, tokenizer)
    assert own == seen
    answers = [*zip(["assistant", "the", "cat", "sat"], [*A.split(), "<end>"], strict=True)]
    answers += zip(["assistant", "the", "dog"], [*B.split(), "<end>"], strict=True)
    assert own == answers
    assert len(example["teacher_input_ids"]) - len(example["input_ids"]) == 7


def test_each_side_has_its_own_maximum_and_targets_that_do_not_fit_one_are_on_neither() -> None:
    tokenizer = words(CHAT)
    row = conversation("the", A, teacher=("the dog sat on a mat", A))
    whole = encode([row], tokenizer, 100).examples[0]
    length = len(whole["teacher_input_ids"])
    found = encode([row], tokenizer, 100, view=View(length - 2))
    assert found.cut == [0]
    own, seen = sides(found.examples[0], tokenizer)
    assert own == seen == sides(whole, tokenizer)[0][:-2]
    skipped = encode([row], tokenizer, 100, "skip", view=View(length - 1))
    assert "tokens for the teacher (data.teacher_max_length)" in skipped.skipped[0][1]
    full = encode([row], tokenizer, 100, view=View(8)).skipped
    assert full == [
        (0, "has a prompt for the teacher that leaves no room for an answer in 8 tokens")
    ]


def test_the_teacher_may_have_other_variables_of_the_template() -> None:
    tokenizer = words("{{ 'dog ' if mode else '' }}" + CHAT)
    view = View(100, Rendering(arguments={"mode": True}), is_given=True)
    found = encode([conversation("the", A)], tokenizer, 100, view=view)
    (example,) = found.examples
    dog = tokenizer.convert_tokens_to_ids("dog")
    assert example["teacher_input_ids"] == [dog, *example["input_ids"]]
    assert not found.rewritten


def test_the_teacher_reads_the_students_tokens_where_its_template_writes_others() -> None:
    thinks = "{{ '<think> ' if mode and m['role'] == 'assistant' else '' }}{{ m['content'] }}"
    tokenizer = words(CHAT.replace("{{ m['content'] }}", thinks))
    assert "think" in tokenizer.chat_template
    view = View(100, Rendering(arguments={"mode": True}), is_given=True)
    found = encode([conversation("the", A, "on", B)], tokenizer, 100, view=view)
    assert found.rewritten == [0]
    (example,) = found.examples
    assert example["teacher_input_ids"] == example["input_ids"]


def test_a_whole_prompt_leads_to_the_last_answer_alone() -> None:
    tokenizer = words(CHAT)
    row = conversation("the", A, "on", B, teacher=("a long prompt", B))
    (skipped,) = encode([row], tokenizer, 100).skipped
    assert "set data.supervise=last" in skipped[1]


def test_a_batch_has_both_sides_and_a_row_without_another_prompt_has_its_own_twice() -> None:
    tokenizer = words(CHAT)
    rows = [conversation("the", A, teacher=("the dog sat on", A)), conversation("on a mat", C)]
    examples = encode(rows, tokenizer, 100).examples
    assert "teacher_input_ids" not in examples[1]
    batch = Collator(0)(examples)
    for number, example in enumerate(examples):
        ids = example.get("teacher_input_ids", example["input_ids"])
        size = len(ids)
        assert batch["teacher_input_ids"][number, :size].tolist() == ids
        assert int(batch["teacher_attention_mask"][number].sum()) == size
        own = batch["shift_labels"][number]
        seen = batch["teacher_shift_labels"][number]
        assert own[own >= 0].tolist() == seen[seen >= 0].tolist()
    packed = Collator(0)([pack(examples, 100)[0]])
    starts = (packed["teacher_position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(examples[0]["input_ids"]) < len(examples[1]["input_ids"])  # so that one comes first
    assert starts == [0, len(examples[1]["input_ids"])]
    own, seen = packed["shift_labels"][0], packed["teacher_shift_labels"][0]
    assert own[own >= 0].tolist() == seen[seen >= 0].tolist()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"template": "{promt}"}, r"unknown \{promt\}; did you mean \{prompt\}"),
        ({"template": "hello"}, "has none of"),
        ({"template": "{context}"}, "needs data.teacher_context_field"),
        ({"context_field": "s"}, "no effect without data.teacher_template"),
        ({"context_field": "s", "template": "{prompt}!"}, r"has no \{context\}"),
        ({"template": " {prompt} "}, "alone is what the student reads"),
        ({"template": "{prompt}!", "prompt_field": "long"}, "remove one of them"),
    ],
)
def test_keys_that_exclude_each_other_are_refused(keys: dict[str, str], problem: str) -> None:
    from kdrun.config.data_section import DataConfig

    data = DataConfig.model_validate({f"teacher_{key}": value for key, value in keys.items()})
    with pytest.raises(InputError, match=problem):
        TeacherPrompt.of(data)
