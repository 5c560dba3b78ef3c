"""Conversations of a few words, and a tokenizer of words for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdrun.data.chat import USUAL_RENDERING
from kdrun.data.encode import encode_chats
from kdrun.data.encoding import Example
from kdrun.data.rows import ChatRow, Message, Position

WORDS = (
    *("<pad>", "<bos>", "<eos>", "<unk>"),
    *("the", "cat", "dog", "sat", "on", "mat", "a", "b", "c", "d", "user", "assistant", "system"),
)
ADDED = ["<think>", "</think>", "</call>"]
SPECIAL = ["<end>", "<user>"]
PROMPT = "{% if add_generation_prompt %}assistant {% endif %}"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}" + PROMPT
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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL,
    )
    tokenizer.add_tokens(ADDED)
    tokenizer.chat_template = template
    return tokenizer


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
