"""The tokens that end answers, and their entry in the generation settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from kdrun.data.collate import IGNORE_INDEX
from kdrun.data.messages import Message
from kdrun.data.turn_ends import special_tokens
from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOOKED_AT = 1000
_USUAL = 0.05
"""Minimum share of answers that end with a token for the student to learn it."""


def own_ends(model: PreTrainedModel) -> set[int]:
    """Return the tokens that end a model's text, by its own generation settings."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    return set(ids if isinstance(ids, list) else [ids]) - {None}


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer, from tokenizer, model and chat template."""
    from kdrun.data.encode import encode_chats
    from kdrun.data.formats import ChatRow
    from kdrun.data.records import Position

    found = own_ends(model) | {tokenizer.eos_token_id}
    turn = ChatRow((Message("user", "a"), Message("assistant", "b")), Position("", 0))
    try:
        example = encode_chats([turn], tokenizer, 1 << 20).examples[0]
    except InputError:  # a template that rejects such a short conversation
        return found - {None}
    answer = [label for label in example["labels"] if label >= 0]
    if answer[-1] in tokenizer.added_tokens_decoder:
        found.add(answer[-1])
    return found - {None}


def taught_ends(
    examples: Iterable[Mapping[str, Sequence[int]]], tokenizer: PreTrainedTokenizerBase
) -> set[int]:
    """Return the special tokens that end answers in the first rows."""
    special = set(special_tokens(tokenizer).values())
    found: Counter[int] = Counter()
    for example in islice(examples, _LOOKED_AT):
        labels = [*example["labels"], IGNORE_INDEX]
        found.update(
            label
            for label, after in pairwise(labels)
            if label != IGNORE_INDEX and after == IGNORE_INDEX
        )
    most = _USUAL * sum(found.values())
    return {token for token, count in found.items() if token in special and count >= most}


def settle_generation(model: PreTrainedModel, ends: set[int], pad: int | None) -> list[str]:
    """Add the end tokens to a model's generation settings, and fix settings that cannot be saved.

    The settings are saved with the student, so that any server stops where the student was
    trained to stop.

    Args:
        model: the student, whose settings are changed.
        ends: the tokens that its answers end with.
        pad: the padding token, for models without one.

    Returns:
        The fixes, one line each.
    """
    from transformers import GenerationConfig

    settings = model.generation_config
    if settings is None:
        settings = model.generation_config = GenerationConfig()
    ordered = sorted(ends)
    settings.eos_token_id = ordered[0] if len(ordered) == 1 else (ordered or None)
    if settings.pad_token_id is None:
        settings.pad_token_id = pad
    problem = _problem(settings)
    if problem is None:
        return []
    if not settings.do_sample:  # sampling settings imply sampling
        settings.do_sample = True
        if _problem(settings) is None:
            return [
                "generation settings of the student: sampling settings without do_sample "
                "cannot be saved; do_sample=true is added"
            ]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(settings, name) for name in names})
    return [
        f"generation settings of the student: they cannot be saved ({problem}); only its begin, "
        "end and padding tokens are kept"
    ]


def _problem(settings: Any) -> str | None:
    """Return why settings cannot be saved, or None."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return None
