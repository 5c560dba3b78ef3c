"""Pairs whose tokens are whole words, so that a test can say what a model reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<unk>",
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "a",
    "b",
    "c",
    "d",
    "e",
    "f",
    "user",
    "assistant",
    "system",
]
PROMPT = "{% if add_generation_prompt %}assistant {% endif %}"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}" + PROMPT


def make_tokenizer(
    template: str | None = None,
    special: Sequence[str] = (),
    added: Sequence[str] = (),
    eos: str | None = "<eos>",
) -> PreTrainedTokenizerFast:
    """A tokenizer of words, with special and other tokens on top of them."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=eos,
        unk_token="<unk>",
    )
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(added))
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(
    folder: Path, special: Sequence[str] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """Save such a tokenizer."""
    tokenizer = make_tokenizer(template, special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, vocab: int, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A Llama of one layer; ``settings`` go into its generation_config.json as they are."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    if settings:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
    return model


def save_speaker(folder: Path, vocab: int, follow: Mapping[int, int], default: int) -> None:
    """A model that says a certain token after each token."""
    model = save_model(folder, vocab)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.zero_()
        for token in range(vocab):
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[follow.get(token, default), token] = 10.0
    model.save_pretrained(folder)


def save_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def usual_rows(count: int = 12) -> list[dict[str, str]]:
    """Rows of different prompts."""
    ends = ["the", "cat", "dog", "sat", "on", "mat", "a", "b", "c", "d", "e", "f"]
    return [
        {
            "prompt": f"the {ends[i % 12]} {ends[(i + i // 12) % 12]}",
            "response": f"sat on {ends[-i]}",
        }
        for i in range(count)
    ]
