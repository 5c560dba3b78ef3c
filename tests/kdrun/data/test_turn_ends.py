"""Answers under templates that end no turn, and of rows that are rendered already.

The letters and numbers are those under which the failures were collected.
"""

from __future__ import annotations

from typing import Any

import pytest
from word_chats import ENDLESS, chat, encoded, words
from words import CHAT

from kdrun.data.encode import encode, encode_chats
from kdrun.data.encode_report import report_on
from kdrun.data.templates import Rendering
from kdrun.errors import InputError
from kdrun.models.generation import encode_prompt


class TestEnds:
    @pytest.mark.parametrize("answer", ["a b", "a b </call>", "<think> a </think>", "a <end>"])
    def test_f16_the_words_of_an_answer_do_not_end_it(self, answer: str) -> None:
        ((_, supervised),) = encoded(words(ENDLESS), chat("the cat", answer))
        assert supervised == f"{answer} <eos>"
        ((_, supervised),) = encoded(words(CHAT), chat("the cat", answer))
        assert supervised == f"{answer} <end>"

    def test_f16_in_whatever_order_the_rows_come(self) -> None:
        rows = [chat("the cat", "a </call>"), chat("the cat", "a"), chat("the cat", "b </call>")]
        for order in (rows, rows[::-1]):
            found = encoded(words(ENDLESS), *order)
            assert all(supervised.endswith("<eos>") for _, supervised in found)

    def test_f16_a_turn_that_begins_with_what_follows_from_its_words(self) -> None:
        length = "{% if m['role'] == 'assistant' %}{{ m['content'] | length }} {% endif %}"
        template = CHAT.replace("{{ m['content'] }}", length + "{{ m['content'] }}")
        ((_, supervised),) = encoded(words(template), chat("the cat", "sat"))
        assert supervised == "<unk> sat <end>"

    def test_f50_earlier_answers_have_an_end(self) -> None:
        (found,) = encoded(words(ENDLESS), chat("the cat", "a b", "the dog", "c d"))
        assert found == (
            "user the cat assistant a b <eos> user the dog assistant c d <eos>",
            "a b <eos> c d <eos>",
        )

    def test_f50_without_knowing_where_tokens_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer, row = words(ENDLESS), chat("the cat", "a b", "the dog", "c d", system="the mat")
        fast = encoded(tokenizer, row)
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
        assert encoded(tokenizer, row) == fast

    @pytest.mark.parametrize("template", [ENDLESS, CHAT, None])
    def test_f50_prompts_are_what_was_trained_on(self, template: str | None) -> None:
        tokenizer = words(template)
        row = chat("the cat", "a b", "the dog", "c d </call>", "a mat", "c", system="the mat")
        (example,) = encode_chats([row], tokenizer, 100).examples
        prompt = encode_prompt(tokenizer, row.messages[:-1])
        assert example["input_ids"][: len(prompt)] == prompt
        end = "<end>" if template == CHAT else "<eos>"
        assert tokenizer.convert_ids_to_tokens(prompt).count(end) >= 2

    def test_f50_the_token_that_opens_the_next_turn_is_an_end(self) -> None:
        # As GLM's: <user> stands before every question, nothing behind answers.
        template = ENDLESS.replace(
            "{{ m['role'] }}", "{{ '<user>' if m['role'] == 'user' else m['role'] }}"
        )
        (found,) = encoded(words(template), chat("the cat", "a b", "the dog", "c d"))
        assert found[0].count("<eos>") == 1
        assert found[1] == "a b <user> c d <eos>"

    def test_f50_a_template_without_words_behind_its_last_answer(self) -> None:
        template = CHAT.replace(
            " <end>", "{% if m['role'] == 'user' or not loop.last %} <end>{% endif %}"
        )
        (found,) = encoded(words(template), chat("the cat", "a b", "the dog", "c d"))
        assert found[1] == "a b <end> c d <eos>"

    @pytest.mark.parametrize("template", [ENDLESS, None])
    def test_f17_no_end_at_all_is_told(self, template: str | None) -> None:
        tokenizer = words(template, eos=None)
        tokenizer.name_or_path = "S"
        with pytest.raises(InputError, match=r"^S: its tokenizer has no end-of-text token.*config"):
            encode_chats([chat("the cat", "sat")], tokenizer, 100)

    def test_f17_a_template_with_an_end_needs_no_other(self) -> None:
        ((_, supervised),) = encoded(words(CHAT, eos=None), chat("the cat", "sat"))
        assert supervised == "sat <end>"


class TestRendered:
    ROW = chat("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>")
    WHOLE = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"

    def test_p19_control_tokens_in_the_text_are_told_in_one_line(self, tiny_tokenizer: Any) -> None:
        rows = [self.ROW, chat("Hi", "Hello", number=2)]
        (line,) = encode_chats(rows, tiny_tokenizer, 100).report.warnings()
        assert line.startswith("rows.jsonl: the text of 1 of 2 rows contains control tokens")
        assert "such as '<|im_start|>': line 1; " in line
        assert "data.rendered=true" in line

    def test_p19_without_a_template_too(self) -> None:
        rows = [chat("the cat", "sat <eos>")]
        (line,) = encode_chats(rows, words(None), 100).report.warnings()
        assert "such as '<eos>'" in line

    def test_p19_rendered_rows_are_joined_as_they_are(self, tiny_tokenizer: Any) -> None:
        rendering = Rendering(rendered=True)
        encoding = encode([self.ROW], tiny_tokenizer, 100, rendering=rendering)
        (example,) = encoding.examples
        assert example["input_ids"] == tiny_tokenizer(self.WHOLE)["input_ids"]
        labels = [label for label in example["labels"] if label >= 0]
        assert tiny_tokenizer.decode(labels) == "Hello<|im_end|>"
        assert not report_on([self.ROW], encoding, 100, rendered=True).report.warnings()

    def test_p19_rendered_as_the_template_renders(self, tiny_tokenizer: Any) -> None:
        ids = encode_chats([chat("Hi", "Hello")], tiny_tokenizer, 100).examples[0]["input_ids"]
        rendered = encode([self.ROW], tiny_tokenizer, 100, rendering=Rendering(rendered=True))
        # The template's line break behind the turn, which nothing is learned from, is all it lacks.
        assert ids[: len(rendered.examples[0]["input_ids"])] == rendered.examples[0]["input_ids"]

    def test_p19_a_rendered_answer_has_one_end(self) -> None:
        for template in (CHAT, ENDLESS, None):
            rows = [
                chat("user the cat <end> assistant ", "sat <end>"),
                chat("user the cat <end> assistant ", "sat"),
                chat("user the cat <end> assistant ", "sat </call>"),
            ]
            found = [own for _, own in encoded(words(template), *rows, rendered=True)]
            assert found == ["sat <end>", "sat <eos>", "sat </call> <eos>"]

    def test_p19_rendered_prompts_are_given_as_they_are(self, tiny_tokenizer: Any) -> None:
        ids = encode_prompt(tiny_tokenizer, self.ROW.messages[:1], Rendering(rendered=True))
        assert tiny_tokenizer.decode(ids) == self.ROW.messages[0].content
