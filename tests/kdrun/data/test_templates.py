"""Chat templates that leave something out, read parts only, or fail.

The letters and numbers are those under which the failures were collected.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from word_chats import (
    CUTS_EARLIER_REASONING,
    CUTS_REASONING,
    PARTS,
    WITHOUT_SYSTEM,
    chat,
    encoded,
    read,
    words,
)
from words import CHAT, PROMPT

from kdrun.data.chat import ChatRenderer
from kdrun.data.encode import encode, encode_chats
from kdrun.data.encode_report import EncodedRows, report_on
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import RawRows, encode_held_out, encode_rows
from kdrun.data.rows import ChatRow, Message, Position
from kdrun.data.token_cache import TokenCache
from kdrun.errors import InputError
from kdrun.models.generation import encode_prompt


def strictly(tokenizer: Any, *rows: ChatRow) -> EncodedRows:
    return report_on(rows, encode(rows, tokenizer, 100), 100, strict=True)


class TestLost:
    ROWS = (
        chat("the cat", "<think> a b c </think> sat", number=1),
        chat("the dog", "on a mat", number=2),
        chat("a dog", "<think> d </think> mat", number=3),
    )

    def test_f1_reasoning_that_the_template_cuts_is_told(self) -> None:
        tokenizer = words(CUTS_REASONING)
        found = encode_chats(self.ROWS, tokenizer, 100)
        assert read(tokenizer, found.examples[0])[1] == "sat <end>"
        (line,) = found.report.warnings()
        assert line.startswith(
            "rows.jsonl: the chat template omits or changes part of the answer in 2 of 3 rows "
            "(67%): lines 1, 3: the student does not learn it"
        )

    def test_f1_strict_refuses(self) -> None:
        with pytest.raises(InputError, match=r"rows\.jsonl, line 1: the row loses part of the an"):
            strictly(words(CUTS_REASONING), *self.ROWS)
        assert strictly(words(CHAT), *self.ROWS).report.kept == 3

    def test_f1_a_template_that_keeps_it_is_not_told(self) -> None:
        tokenizer = words(CHAT)
        found = encode_chats(self.ROWS, tokenizer, 100)
        assert read(tokenizer, found.examples[0])[1] == "<think> a b c </think> sat <end>"
        assert not found.report.warnings()

    def test_f1_an_answer_that_is_lost_whole_is_skipped_and_counted(self) -> None:
        lost = chat("the cat", "<think> sat </think>", number=4)
        found = encode_chats([*self.ROWS, lost], words(CUTS_REASONING), 100)
        assert found.report.kept == 3
        assert found.report.warnings()[0] == (
            "rows.jsonl: skipped 1 of 4 rows: line 4: has an answer that the chat template omits"
        )
        with pytest.raises(InputError, match=r"line 4: none of the 1 rows .* template omits"):
            encode_chats([lost], words(CUTS_REASONING), 100)

    def test_f1_reasoning_of_earlier_answers(self) -> None:
        tokenizer = words(CUTS_EARLIER_REASONING)
        row = chat("the cat", "<think> a </think> sat", "the dog", "<think> b </think> mat")
        found = encode_chats([row], tokenizer, 100)
        assert read(tokenizer, found.examples[0])[1] == "sat <end> <think> b </think> mat <end>"
        (line,) = found.report.warnings()
        assert "part of an earlier answer in 1 of 1 rows (100%): line 1" in line

    def test_f1_an_answer_that_begins_in_the_prompt_is_whole(self) -> None:
        tokenizer = words(CHAT.replace("assistant {% endif", "assistant <think> {% endif"))
        found = encode_chats([self.ROWS[0]], tokenizer, 100)
        assert read(tokenizer, found.examples[0])[1] == "a b c </think> sat <end>"
        assert not found.report.warnings()

    def test_f1_other_white_space_is_no_loss(self) -> None:
        template = CHAT.replace("m['content']", "m['content'].split() | join('  ')")
        assert not encode_chats(self.ROWS, words(template), 100).report.warnings()

    def test_f1_generation_blocks_go_the_same_way(self) -> None:
        template = (
            "{{ messages | length }} {% for m in messages %}{{ m['role'] }} "
            "{% if m['role'] == 'assistant' %}{% generation %}"
            "{{ m['content'].split('</think>')[-1] }} <end>{% endgeneration %}"
            "{% elif m['role'] == 'user' %}{{ m['content'] }}{% endif %} {% endfor %}"
        )
        tokenizer = words(template)
        rows = [
            *self.ROWS,
            chat("the cat", "<think> sat </think>", number=4),
            chat("the cat", "sat", number=5, system="the dog"),
        ]
        report = encode_chats(rows, tokenizer, 100).report
        assert [bad.position.number for bad in report.skipped] == [4]
        assert {k: [p.number for p in v] for k, v in report.lost.items()} == {
            "part of the answer": [1, 3],
            "the system message": [5],
        }

    def test_f1_the_token_cache_keeps_it(self, tmp_path: Any) -> None:
        tokenizer, cache = words(CUTS_REASONING), TokenCache(tmp_path)
        for _ in range(2):
            found = Encoder(tokenizer, 100, cache=cache).chats(self.ROWS).encoding()
            assert found.lost == [(0, "part of the answer"), (2, "part of the answer")]
        assert len(list(tmp_path.iterdir())) == 1

    def test_f3_a_system_message_that_the_template_passes_over(self) -> None:
        rows = [chat("the cat", "sat", system="the dog"), chat("the cat", "sat", number=2)]
        report = encode_chats(rows, words(WITHOUT_SYSTEM), 100).report
        assert report.kept == 2
        (line,) = report.warnings()
        assert "omits or changes the system message in 1 of 2 rows (50%): line 1" in line
        with pytest.raises(InputError, match="line 1: the row loses the system message"):
            strictly(words(WITHOUT_SYSTEM), *rows)
        assert not encode_chats(rows, words(CHAT), 100).report.warnings()

    def test_f3_a_system_message_in_another_place_is_no_loss(self) -> None:
        # Mistral's templates write it in the last question.
        template = (
            "{% set s = messages[0]['content'] %}{% for m in messages[1:] %}{{ m['role'] }} "
            "{{ m['content'] }} {% if loop.first %}{{ s }}{% endif %} <end> {% endfor %}" + PROMPT
        )
        row = chat("the cat", "sat", "the dog", "on a mat", system="b c d")
        encoding = encode([row], words(template), 100)
        assert read(words(template), encoding.examples[0])[0].startswith("user the cat b c d <end>")
        assert not encoding.lost

    def test_f3_a_question_that_the_template_changes(self) -> None:
        template = CHAT.replace("m['content']", "m['content'].replace('the', 'a')")
        (line,) = encode_chats([chat("the cat", "sat")], words(template), 100).report.warnings()
        assert "omits or changes a user message in 1 of 1 rows" in line


def test_templates_in_use_lose_nothing_of_plain_rows(tiny_tokenizer: Any) -> None:
    """Those that TRL keeps of current models."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("the package trl is not installed")
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    assert files
    rows = [
        chat("What is it?", "An apple."),
        chat("What is it?", "An apple.", "And that?", "A pear."),
        chat("What is it?", "An apple.", system="Be brief, my friend."),
    ]
    texts = [file.read_text(encoding="utf-8") for file in files]
    tokenizer = copy.deepcopy(tiny_tokenizer)
    own = sorted({token for text in texts for token in re.findall(r"<\|\w+\|>", text)})
    tokenizer.add_special_tokens({"additional_special_tokens": own})
    for file, text in zip(files, texts, strict=True):
        tokenizer.chat_template = text
        encoding = encode(rows, tokenizer, 10_000)
        assert not encoding.lost, file.name
        assert all("System role" in reason for _, reason in encoding.skipped), file.name
        for row, example in zip(rows, encoding.examples, strict=False):
            learned = tokenizer.decode([label for label in example["labels"] if label >= 0])
            for message in row.messages:
                assert (message.role == "assistant") == (message.content in learned), file.name


class TestParts:
    def test_f2_a_template_of_parts_is_given_parts(self) -> None:
        ((text, supervised),) = encoded(words(PARTS), chat("the cat", "sat on a"))
        assert text.startswith("user the cat <end> assistant sat on a <end>")
        assert supervised == "sat on a <end>"

    def test_f2_so_are_prompts(self) -> None:
        tokenizer = words(PARTS)
        ids = encode_prompt(tokenizer, [Message("user", "the cat")])
        assert tokenizer.decode(ids) == "user the cat <end> assistant"

    def test_f2_it_is_said(self) -> None:
        rows = [chat("the cat", "sat")]
        said = "the chat template accepts only lists of parts; each text is passed as one part"
        encoder = Encoder(words(PARTS), 100)
        assert said in encode_held_out(rows, encoder)[1]
        assert encode_rows(RawRows(rows, rows, ()), encoder).notes.count(said) == 1
        assert said not in encode_held_out(rows, Encoder(words(CHAT), 100))[1]

    def test_f2_a_template_of_both_is_given_texts(self) -> None:
        both = PARTS.replace(
            "{% for p in", "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in"
        ).replace("{% endfor %} <end>", "{% endfor %}{% endif %} <end>")
        assert not ChatRenderer(words(both)).reads_parts
        assert encoded(words(both), chat("the cat", "sat")) == encoded(
            words(CHAT), chat("the cat", "sat")
        )

    def test_f2_a_template_that_writes_no_answers_at_all(self) -> None:
        template = CHAT.replace("m['content']", "m['text']")
        with pytest.raises(InputError, match="has an answer that the chat template omits"):
            encode_chats([chat("the cat", "sat")], words(template), 100)


class TestFailures:
    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("{{ 'x' + tools }}", "can only concatenate str"),
            ("{{ 'x' + (messages | length) }}", "can only concatenate str"),
            ("{{ 1 // 0 }}", "zero"),
            ("{{ range(1000000) }}", "Range too big"),
            ("{% endfo %}", "unknown tag 'endfo'"),
        ],
    )
    def test_f28_whatever_a_template_fails_with_is_one_line(self, code: str, reason: str) -> None:
        with pytest.raises(InputError) as info:
            encode_chats([chat("the cat", "sat", number=7)], words(CHAT + code), 100)
        message = str(info.value)
        assert "\n" not in message
        assert "rows.jsonl, line 7: none of the 1 rows can be used" in message
        assert "this one is rejected by the chat template (" in message
        assert reason in message

    def test_f28_a_row_that_it_fails_on_is_skipped(self) -> None:
        template = CHAT + "{% if messages[0]['content'] == 'the dog' %}{{ 'x' + 1 }}{% endif %}"
        rows = [chat("the cat", "sat"), chat("the dog", "sat", number=2)]
        report = encode_chats(rows, words(template), 100).report
        assert [bad.position.number for bad in report.skipped] == [2]
        with pytest.raises(InputError, match="line 2: the row is rejected by the chat template"):
            strictly(words(template), *rows)

    def test_f41_named_templates_need_a_usual_one(self) -> None:
        tokenizer = words(None)
        tokenizer.name_or_path = "S"
        tokenizer.chat_template = {"tool_use": CHAT, "rag": CHAT}
        with pytest.raises(InputError, match=r"^S: .*templates \(rag, tool_use\) and none called"):
            encode_chats([chat("the cat", "sat")], tokenizer, 100)
        tokenizer.chat_template["default"] = CHAT
        assert encoded(tokenizer, chat("the cat", "sat")) == encoded(
            words(CHAT), chat("the cat", "sat")
        )

    def test_f31_the_file_and_the_part_are_named(self) -> None:
        long = [chat("the cat " * 60, "sat", number=n) for n in (1, 2)]
        held_out = [replace(row, position=Position("eval.jsonl", 1)) for row in long]
        rows = RawRows([chat("the cat", "sat")], held_out, ())
        with pytest.raises(
            InputError, match=r"^eval\.jsonl: data\.max_length=64: all 2 held-out rows are skipped"
        ):
            encode_rows(rows, Encoder(words(CHAT), 64))
