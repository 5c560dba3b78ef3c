"""Conversations of a few words, chat templates for them, and what is encoded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from words import CHAT, PROMPT, make_tokenizer

from kdrun.data.encode import encode_chats
from kdrun.data.encoding import Example
from kdrun.data.rows import ChatRow, Message, Position
from kdrun.data.templates import USUAL_RENDERING

ADDED = ["<think>", "</think>", "</call>"]
SPECIAL = ["<end>", "<user>"]
ENDLESS = CHAT.replace(" <end>", "")
CUTS_REASONING = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'].split('</think>')[-1] }} <end> "
    "{% endfor %}" + PROMPT
)
CUTS_EARLIER_REASONING = CUTS_REASONING.replace(
    "m['content'].split('</think>')[-1]",
    "m['content'] if loop.last else m['content'].split('</think>')[-1]",
)
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }} {{ m['content'] }} <end> "
    "{% endif %}{% endfor %}" + PROMPT
)
PARTS = (
    "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %} <end> {% endfor %}" + PROMPT
)


def words(template: str | None, eos: str | None = "<eos>") -> Any:
    """A tokenizer of words, with tokens that are added and some of them special."""
    return make_tokenizer(template, SPECIAL, ADDED, eos)


def chat(*contents: str, number: int = 1, system: str | None = None) -> ChatRow:
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(r, c) for r, c in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
    if system is not None:
        messages.insert(0, Message("system", system))
    return ChatRow(tuple(messages), Position("rows.jsonl", number))


def read(tokenizer: Any, example: Example) -> tuple[str, str]:
    """All tokens, and those that are supervised."""
    ids, labels = example["input_ids"], [label for label in example["labels"] if label >= 0]
    return (
        " ".join(tokenizer.convert_ids_to_tokens(ids)),
        " ".join(tokenizer.convert_ids_to_tokens(labels)),
    )


def encoded(tokenizer: Any, *rows: ChatRow, rendered: bool = False) -> list[tuple[str, str]]:
    rendering = replace(USUAL_RENDERING, rendered=rendered)
    found = encode_chats(rows, tokenizer, 100, rendering=rendering)
    return [read(tokenizer, example) for example in found.examples]
