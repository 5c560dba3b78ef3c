from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kdrun.data.collate import IGNORE_INDEX
from kdrun.data.encode import encode_chats
from kdrun.data.encode_report import EncodedRows, report_on
from kdrun.data.encoder import Encoder
from kdrun.data.encoding import Example
from kdrun.data.prepare import encode_held_out
from kdrun.data.rows import ChatRow, Message, Position, TextRow, load_rows
from kdrun.data.token_cache import TokenCache
from kdrun.errors import InputError


def chat(*contents: str, number: int = 1, system: str | None = None) -> ChatRow:
    """A conversation of alternating questions and answers."""
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(r, c) for r, c in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
    if system is not None:
        messages.insert(0, Message("system", system))
    return ChatRow(tuple(messages), Position("rows.jsonl", number))


def encode_one(tokenizer: Any, row: ChatRow, max_length: int = 512) -> Example:
    (example,) = encode_chats([row], tokenizer, max_length).examples
    return example


def targets(tokenizer: Any, example: Example) -> str:
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORE_INDEX)
    text: str = tokenizer.decode([label for label in example["labels"] if label != IGNORE_INDEX])
    return text


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def with_bos(tokenizer: Any) -> Any:
    """A tokenizer that puts its begin-of-text token before every text."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<|endoftext|>"
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", changed.bos_token_id)]
    )
    assert changed("a")["input_ids"][0] == changed.bos_token_id
    return changed


def with_harmony(tokenizer: Any, before_the_last: str = "", after_the_others: str = "") -> Any:
    """Turns as gpt-oss writes them: the last answer ends with a token of its own."""
    answer = "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}"
    changed = with_template(
        tokenizer,
        "<|start|>system<|message|>today<|end|>{% for m in messages %}"
        "{% if m['role'] != 'assistant' %}"
        "<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
        f"{{% elif loop.last %}}{before_the_last}{answer}<|return|>"
        f"{{% else %}}{answer}{after_the_others}<|end|>{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    )
    names = ("start", "end", "message", "channel", "return")
    tokens = [f"<|{name}|>" for name in names]
    changed.add_special_tokens({"additional_special_tokens": tokens, "eos_token": "<|return|>"})
    return changed


class TestTargets:
    def test_only_the_answer_and_its_end_of_turn(self, tiny_tokenizer: Any) -> None:
        assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
        example = encode_one(tiny_tokenizer, chat("the question", "an answer"))
        assert targets(tiny_tokenizer, example) == "an answer<|im_end|>"
        # The line break that the template writes after the turn is there, and is no target.
        assert example["labels"][-1] == IGNORE_INDEX
        assert example["labels"][-2] == tiny_tokenizer.eos_token_id

    def test_ids_are_those_of_the_template(self, tiny_tokenizer: Any) -> None:
        row = chat("the question", "an answer", "more?", "no", system="be kind")
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        expected = tiny_tokenizer.apply_chat_template(messages)["input_ids"]
        assert encode_one(tiny_tokenizer, row)["input_ids"] == expected

    def test_the_prompt_is_what_generation_starts_from(self, tiny_tokenizer: Any) -> None:
        example = encode_one(tiny_tokenizer, chat("the question", "an answer"))
        prompt = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": "the question"}], add_generation_prompt=True
        )["input_ids"]
        first = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
        assert example["input_ids"][:first] == prompt

    def test_every_answer_of_a_conversation(self, tiny_tokenizer: Any) -> None:
        example = encode_one(tiny_tokenizer, chat("a?", "one", "b?", "two", system="s"))
        assert targets(tiny_tokenizer, example) == "one<|im_end|>two<|im_end|>"

    @pytest.mark.parametrize("answer", [" padded \n", "déjà 你 ❤", "\n\nfirst", "<|im_end|> x"])
    def test_awkward_answers(self, tiny_tokenizer: Any, answer: str) -> None:
        example = encode_one(tiny_tokenizer, chat("a?", answer))
        assert targets(tiny_tokenizer, example) == answer + "<|im_end|>"

    def test_a_template_that_ends_its_turns_with_a_space_removing_token(
        self, tiny_tokenizer: Any
    ) -> None:
        # Phi-3's special tokens swallow the white space after them.
        from tokenizers import AddedToken

        changed = copy.deepcopy(tiny_tokenizer)
        changed.add_special_tokens(
            {"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]}
        )
        changed.chat_template = changed.chat_template.replace("<|im_end|>", "<|end|>")
        example = encode_one(changed, chat("a?", "one", "b?", "two"))
        assert targets(changed, example) == "one<|end|>two<|end|>"


class TestTemplates:
    def test_d7_one_begin_of_text(self, tiny_tokenizer: Any) -> None:
        template = "{{ bos_token }}" + tiny_tokenizer.chat_template
        changed = with_template(with_bos(tiny_tokenizer), template)
        ids = encode_one(changed, chat("a?", "one", "b?", "two"))["input_ids"]
        assert ids.count(changed.bos_token_id) == 1
        assert ids[0] == changed.bos_token_id

    def test_without_a_template(self, tiny_tokenizer: Any) -> None:
        changed = with_template(tiny_tokenizer, None)
        example = encode_one(changed, chat("the question", "an answer"))
        assert changed.decode(example["input_ids"]) == "the question\nan answer<|im_end|>"
        assert targets(changed, example) == "an answer<|im_end|>"
        more = encode_one(changed, chat("a?", "one", "b?", "two", system="s"))
        assert changed.decode(more["input_ids"]) == "s\na?\none<|im_end|>b?\ntwo<|im_end|>"

    def test_without_a_template_and_with_a_begin_of_text(self, tiny_tokenizer: Any) -> None:
        changed = with_template(with_bos(tiny_tokenizer), None)
        ids = encode_one(changed, chat("a?", "one"))["input_ids"]
        assert ids.count(changed.bos_token_id) == 1
        assert changed.decode(ids) == "<|endoftext|>a?\none<|im_end|>"

    def test_a_template_that_ends_no_turn_gets_an_end(self, tiny_tokenizer: Any) -> None:
        template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        changed = with_template(tiny_tokenizer, template)
        example = encode_one(changed, chat("a?", "one", "b?", "two"))
        assert targets(changed, example) == "one<|im_end|>two<|im_end|>"
        assert example["input_ids"][-1] == changed.eos_token_id

    def test_a_prompt_that_opens_reasoning(self, tiny_tokenizer: Any) -> None:
        template = tiny_tokenizer.chat_template.replace(
            "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
        )
        changed = with_template(tiny_tokenizer, template)
        example = encode_one(changed, chat("a?", "one"))
        assert targets(changed, example) == "one<|im_end|>"

    def test_a_template_that_writes_the_last_turn_otherwise(self, tiny_tokenizer: Any) -> None:
        template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
            "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
            "{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        changed = with_template(tiny_tokenizer, template)
        example = encode_one(changed, chat("a?", "one", "b?", "two"))
        assert targets(changed, example) == "one<|im_end|><think>\n\n</think>\n\ntwo<|im_end|>"

    def test_a_template_that_ends_the_last_turn_otherwise(
        self, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = with_harmony(tiny_tokenizer)
        row = chat("a?", "one", "b?", "the user <", "c?", "two", system="s")
        example = encode_one(changed, row)
        head = "<|channel|>final<|message|>"
        expected = [f"{head}one<|end|>", f"{head}the user <<|end|>", f"{head}two<|return|>"]
        assert targets(changed, example) == "".join(expected)
        monkeypatch.setattr(type(changed), "is_fast", False)
        assert targets(changed, encode_one(changed, row)) == "".join(expected)

    def test_a_last_turn_that_begins_and_ends_otherwise(self, tiny_tokenizer: Any) -> None:
        last = "<|start|>assistant<|channel|>analysis<|message|>hm<|end|>"
        changed = with_harmony(tiny_tokenizer, before_the_last=last)
        example = encode_one(changed, chat("a?", "one", "b?", "two"))
        assert targets(changed, example) == (
            "<|channel|>final<|message|>one<|end|>"
            "<|channel|>analysis<|message|>hm<|end|>"
            "<|start|>assistant<|channel|>final<|message|>two<|return|>"
        )

    def test_a_turn_whose_end_cannot_be_told_is_refused(self, tiny_tokenizer: Any) -> None:
        changed = with_harmony(tiny_tokenizer, after_the_others=" over")
        row = chat("a?", "one", "b?", "two", number=7)
        with pytest.raises(InputError, match=r"rows.jsonl, line 7: the chat template"):
            encode_one(changed, row)
        assert targets(changed, encode_one(changed, chat("a?", "one"))) == (
            "<|channel|>final<|message|>one<|return|>"
        )

    HIDDEN = (
        "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    )

    def test_generation_blocks_where_rendering_tells_nothing(self, tiny_tokenizer: Any) -> None:
        changed = with_template(tiny_tokenizer, self.HIDDEN)
        rows = [chat("a?", "one", "b?", "two"), chat("c?", "three")]
        first, second = encode_chats(rows, changed, 100).examples
        assert targets(changed, first) == "one<|im_end|>two<|im_end|>"
        assert targets(changed, second) == "three<|im_end|>"

    def test_a_template_that_hides_its_answers(self, tiny_tokenizer: Any) -> None:
        template = self.HIDDEN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        changed = with_template(tiny_tokenizer, template)
        with pytest.raises(InputError, match=r"rows.jsonl, line 7: the chat template"):
            encode_chats([chat("a?", "one", number=7)], changed, 100)

    def test_a_row_that_the_template_refuses_is_skipped(self, tiny_tokenizer: Any) -> None:
        refuse = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
        )
        changed = with_template(tiny_tokenizer, refuse + tiny_tokenizer.chat_template)
        rows = [chat("a?", "one"), chat("a?", "one", system="s", number=2)]
        report = encode_chats(rows, changed, 100).report
        assert (report.kept, len(report.skipped)) == (1, 1)
        assert "line 2: is rejected by the chat template (No system.)" in report.warnings()[0]
        with pytest.raises(InputError, match="rejected by the chat template"):
            encode_chats(rows[1:], changed, 100)

    def test_a_tokenizer_that_does_not_know_where_its_tokens_end(
        self, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [chat("a?", "one", "b?", "two", system="s")]
        fast = encode_chats(rows, tiny_tokenizer, 100).examples
        monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
        assert encode_chats(rows, tiny_tokenizer, 100).examples == fast


class TestLength:
    def rows(self, answers: Sequence[str]) -> list[ChatRow]:
        return [chat("?" * 100, answer, number=i) for i, answer in enumerate(answers, 1)]

    def test_d4_a_prompt_that_fills_the_length_is_skipped(self, tiny_tokenizer: Any) -> None:
        rows = [*self.rows(["12345"]), chat("a?", "one", number=2)]
        encoded = encode_chats(rows, tiny_tokenizer, 64)
        assert encoded.report.kept == 1
        assert [bad.position.number for bad in encoded.report.skipped] == [1]
        (warning,) = encoded.report.warnings()
        assert "rows.jsonl: skipped 1 of 2 rows: line 1" in warning
        assert "64" in warning

    def test_d4_all_skipped(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(InputError, match=r"data\.max_length=64: all 2 rows are skipped"):
            encode_chats(self.rows(["1", "2"]), tiny_tokenizer, 64)

    def test_a_long_answer_is_cut_at_its_end(self, tiny_tokenizer: Any) -> None:
        encoded = encode_chats([chat("a?", "x" * 100)], tiny_tokenizer, 64)
        (example,) = encoded.examples
        assert len(example["input_ids"]) == 64
        answer = targets(tiny_tokenizer, example)
        assert set(answer) == {"x"}
        assert encoded.report.cut == (Position("rows.jsonl", 1),)
        assert "cut the end of 1 of 1 rows" in encoded.report.warnings()[0]

    def test_long_rows_are_skipped_where_asked_and_counted(self, tiny_tokenizer: Any) -> None:
        rows = [chat("a?", "x" * 100), chat("a?", "x", number=2), *self.rows(["1"])]
        encoded = encode_chats(rows, tiny_tokenizer, 64, "skip")
        assert encoded.examples == encode_chats(rows[1:2], tiny_tokenizer, 64).examples
        assert not encoded.report.cut
        (warning,) = encoded.report.warnings()
        assert "skipped 2 of 3 rows: lines 1, 1: has more than 64 tokens" in warning
        with pytest.raises(InputError, match=r"none fits \(the shortest has \d+ tokens\)"):
            encode_chats(rows[:1], tiny_tokenizer, 64, "skip")

    def test_a_target_needs_a_token_before_it(self, tiny_tokenizer: Any) -> None:
        changed = with_template(tiny_tokenizer, None)
        prompt = len(changed("ab\n")["input_ids"])
        with pytest.raises(InputError, match="max_length"):
            encode_chats([chat("ab", "one")], changed, prompt)
        example = encode_one(changed, chat("ab", "one"), prompt + 1)
        assert sum(label != IGNORE_INDEX for label in example["labels"]) == 1

    def test_too_short_for_anything(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(InputError, match="at least 2"):
            encode_chats([chat("a?", "one")], tiny_tokenizer, 1)

    def test_no_rows(self, tiny_tokenizer: Any) -> None:
        with pytest.raises(InputError, match="no rows"):
            encode_chats([], tiny_tokenizer, 64)

    def test_the_report_counts_tokens(self, tiny_tokenizer: Any) -> None:
        encoded = encode_chats([chat("a?", "x"), chat("b?", "y")], tiny_tokenizer, 64)
        assert encoded.report.rows == encoded.report.kept == 2
        assert encoded.report.tokens == sum(len(e["input_ids"]) for e in encoded.examples)
        assert encoded.report.supervised_tokens == 4
        assert not encoded.report.warnings()


@pytest.mark.real_model
class TestSmolLM2:
    def check(self, tokenizer: Any, encoded: EncodedRows, rows: Sequence[Any]) -> None:
        for row, example in zip(rows, encoded.examples, strict=True):
            expected = row.messages[-1].content + "<|im_end|>"
            assert targets(tokenizer, example) == expected

    def test_alpaca(self, smollm2_tokenizer: Any, shared_data: Path) -> None:
        rows = load_rows(shared_data / "alpaca_en_demo.json").rows
        encoded = encode_chats(rows, smollm2_tokenizer, 100_000)  # type: ignore[arg-type]
        assert encoded.report.kept == 999
        self.check(smollm2_tokenizer, encoded, rows)

    def test_gsm8k_in_ten_seconds_and_from_the_cache_in_one(
        self, smollm2_tokenizer: Any, shared_data: Path, tmp_path: Path
    ) -> None:
        rows: Sequence[Any] = load_rows(shared_data / "gsm8k_train.jsonl").rows
        cache, seconds = TokenCache(tmp_path), []
        encodings = []
        for _ in range(2):
            # Processor time, so that other work on the machine does not fail the test.
            start = time.process_time()
            encoder = Encoder(smollm2_tokenizer, 100_000, cache=cache, workers=1)
            encodings.append(encoder.chats(rows).encoding())
            seconds.append(time.process_time() - start)
        assert seconds[0] < 10
        assert seconds[1] < 1
        assert list(encodings[1].examples) == list(encodings[0].examples)
        encoded = report_on(rows, encodings[1], 100_000)
        assert encoded.report.kept == 7473
        self.check(smollm2_tokenizer, encoded, rows)


def test_text_without_an_end_token_is_told(tiny_tokenizer: Any) -> None:
    changed = copy.deepcopy(tiny_tokenizer)
    changed.eos_token = None
    rows = [TextRow("the user asks", Position("text.txt", 1))]
    with pytest.raises(InputError, match=r"no end-of-text token.*tokenizer_config\.json"):
        encode_held_out(rows, Encoder(changed, 4))


def test_no_file_is_opened_with_the_platforms_encoding(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "\u201d", "response": "\u2764"}\n', encoding="utf-8")
    code = (
        "import sys\n"
        "from kdrun.data.encode import encode_chats\n"
        "from kdrun.data.rows import load_rows\n"
        "from kdrun.models.tokenizers import load_tokenizer\n"
        "tokenizer = load_tokenizer(sys.argv[1])\n"
        "example = encode_chats(load_rows(sys.argv[2]).rows, tokenizer, 64).examples[0]\n"
        "print(ascii(tokenizer.decode([i for i in example['labels'] if i >= 0])))\n"
    )
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
    }
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", code, tmp_path / "tokenizer", data],
        capture_output=True,
        env=environment,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == r"'\u2764<|im_end|>'"
    # Other packages may open files as they like; ours may not.
    assert not [line for line in done.stderr.splitlines() if "kdrun" in line]
