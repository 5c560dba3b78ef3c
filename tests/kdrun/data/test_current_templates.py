"""Tool calls and reasoning in the chat templates of current models, as TRL keeps them.

What is expected is written down from the formats of the models, not from kdrun's output.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.data.encode import encode
from kdrun.data.rows import ChatRow, Message, Position

TOOL = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"id": "abcdefghi", "type": "function"}
CALLING = CALL | {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASKED = Message("user", "How is it?")
RESULT = Message("tool", '{"sky": "rain"}', name="weather", tool_call_id="abcdefghi")
ANSWER = Message("assistant", "It rains.")
_TOKENS = re.compile(r"<\|\w+\|?>|<｜[\w▁]+｜>|<\w+\|>|</s>")


def row(*messages: Message, tools: Any = None) -> ChatRow:
    return ChatRow(messages, Position("rows.jsonl", 1), tools)


@pytest.fixture
def learned(tiny_tokenizer: Any) -> Callable[..., list[str]]:
    """The supervised parts of a row in a model's template, and what is lost."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("the package trl is not installed")
    folder = Path(spec.origin).parent / "chat_templates"

    def read(name: str, given: ChatRow, lost: tuple[str, ...] = ()) -> list[str]:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        text = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        tokens = sorted(set(_TOKENS.findall(text)))
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        tokenizer.chat_template = text
        encoding = encode([given], tokenizer, 10_000)
        assert not encoding.skipped
        assert [kind for _, kind in encoding.lost] == list(lost)
        (example,) = encoding.examples
        parts: list[list[int]] = [[]]
        for label in example["labels"]:
            if label >= 0:
                parts[-1].append(label)
            elif parts[-1]:
                parts.append([])
        return [tokenizer.decode(part) for part in parts if part]

    return read


QWEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
LLAMA = '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>'
GPT_OSS = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
GLM = (
    "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
    "</tool_call><|observation|>"
)
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)


@pytest.mark.parametrize(
    ("name", "call", "answer"),
    [
        ("qwen2_5", QWEN, "It rains.<|im_end|>"),
        ("qwen3", QWEN, "<think>\n\n</think>\n\nIt rains.<|im_end|>"),
        ("llama3_1", LLAMA, "It rains.<|eot_id|>"),
        ("gptoss", GPT_OSS, "<|channel|>final<|message|>It rains.<|return|>"),
        ("deepseekv3", DEEPSEEK, "It rains.<｜end▁of▁sentence｜>"),
    ],
)
def test_a_call_ends_with_its_token_and_results_are_not_learned(
    learned: Callable[..., list[str]], name: str, call: str, answer: str
) -> None:
    asked = Message("assistant", "", tool_calls=[CALLING])
    lost = ("the tools",) if name == "deepseekv3" else ()
    found = learned(name, row(ASKED, asked, RESULT, ANSWER, tools=TOOLS), lost)
    assert found == [call, answer]


def test_what_asks_for_a_result_is_the_end_of_a_call_that_has_none(
    learned: Callable[..., list[str]],
) -> None:
    asked = Message("assistant", "", tool_calls=[CALLING])
    assert learned("glm4moe", row(ASKED, asked, RESULT, ANSWER, tools=TOOLS))[0] == GLM


@pytest.mark.parametrize(("name", "call"), [("llama3_1", LLAMA), ("gptoss", GPT_OSS)])
def test_a_call_at_the_end_has_one_end(
    learned: Callable[..., list[str]], name: str, call: str
) -> None:
    asked = Message("assistant", "", tool_calls=[CALLING])
    assert learned(name, row(ASKED, asked, tools=TOOLS)) == [call]


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_6"])
def test_calls_before_the_last_question_are_found_where_they_are_written_otherwise(
    learned: Callable[..., list[str]], name: str
) -> None:
    asked = Message("assistant", "I look.", tool_calls=[CALLING])
    talk = row(ASKED, asked, RESULT, ANSWER, ASKED, ANSWER, tools=TOOLS)
    call = "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
    assert learned(name, talk) == [
        f"I look.\n\n{call}</tool_call><|im_end|>",
        "It rains.<|im_end|>",
        "\n</think>\n\nIt rains.<|im_end|>",  # the prompt ends with the opening tag
    ]


def test_words_beside_a_call_that_the_template_omits_are_told(
    learned: Callable[..., list[str]],
) -> None:
    asked = Message("assistant", "I look.", tool_calls=[CALLING])
    talk = row(ASKED, asked, RESULT, ANSWER, tools=TOOLS)
    found = learned("llama3_1", talk, ("part of an earlier answer",))
    assert found == [LLAMA, "It rains.<|eot_id|>"]


OSS_THINKS = "<|channel|>analysis<|message|>Clouds.<|end|><|start|>assistant<|channel|>final"


@pytest.mark.parametrize(
    "answer",
    [
        Message("assistant", "It rains.", reasoning="Clouds."),
        Message("assistant", "<think>\nClouds.\n</think>\n\nIt rains."),
    ],
    ids=["field", "tags"],
)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", "<think>\nClouds.\n</think>\n\nIt rains.<|im_end|>"),
        ("qwen3_8", "Clouds.\n</think>\n\nIt rains.<|im_end|>"),
        ("gptoss", OSS_THINKS + "<|message|>It rains.<|return|>"),
        ("glm4moe", "\n<think>Clouds.</think>\nIt rains.<|im_end|>"),  # kdrun's end
        ("llama3_1", "<think>\nClouds.\n</think>\n\nIt rains.<|eot_id|>"),
    ],
)
def test_reasoning_is_written_as_the_model_writes_it(
    learned: Callable[..., list[str]], name: str, expected: str, answer: Message
) -> None:
    (found,) = learned(name, row(ASKED, answer))
    assert found == expected


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5_think", "llama3_1"])
def test_instructions_of_two_roles_are_joined(learned: Callable[..., list[str]], name: str) -> None:
    talk = row(Message("system", "Be kind."), Message("developer", "Be brief."), ASKED, ANSWER)
    assert learned(name, talk)[-1].rstrip("\n").startswith(("It rains.", "\n</think>\n\nIt rains."))
