"""Loading tokenizers, and comparing those of two models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.errors import InputError
from kdrun.models.failures import one_clear_line
from kdrun.models.locate import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE_STARTS = ("tokenizer", "vocab", "spiece", "sentencepiece", "tekken", "merges")
_SHOWN = 3
_PROBE = "  Hello, world!\n\n\t12345 it's 3.14;  déjà vu — “naïve”\n"


def load_tokenizer(
    name_or_folder: str | Path | ModelSource,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, without reading weights, except from a GGUF file, which contains both.

    Args:
        name_or_folder: A folder or a hub name, or a `ModelSource`, whose GGUF file is used.
        gguf_file: The name of a GGUF file in it that contains the tokenizer.
        trust_remote_code: Run Python code that comes with the tokenizer.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = (
        name_or_folder
        if isinstance(name_or_folder, ModelSource)
        else ModelSource(str(name_or_folder), gguf_file)
    )
    source = _tokenizer_source(source)
    if source.is_local and source.gguf_file is None and not _holds_tokenizer(Path(source.path)):
        # transformers would silently create an empty tokenizer of the model's type.
        raise InputError(
            f"{source} contains no tokenizer; save one in the folder (such as tokenizer.json)"
        )
    with one_clear_line(source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, **source.options
        )
    return tokenizer


def _tokenizer_source(source: ModelSource) -> ModelSource:
    """Return the outermost adapter with a tokenizer, or else the base model."""
    for folder in reversed(source.adapters):
        if _holds_tokenizer(Path(folder)):
            return ModelSource(folder)
    return source.base


def _holds_tokenizer(folder: Path) -> bool:
    return any(entry.name.startswith(_FILE_STARTS) for entry in folder.iterdir())


@dataclass(frozen=True)
class TokenizerMatch:
    """Two tokenizers that give every shared token the same id.

    Attributes:
        vocab_size: Number of logits to compare: one more than the highest id up to which both
            have all tokens that either has.
        notes: Differences that do not matter for distilling, one line each. The student's
            tokenizer encodes for both models.
        left_out: Tokens with ids from ``vocab_size`` on, which only one has.
    """

    vocab_size: int
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def compare_tokenizers(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> TokenizerMatch:
    """Check that both tokenizers give every shared token the same id.

    A teacher's distribution is meaningful for the student only if both use the same ids for the
    same tokens. One of them may have extra tokens, such as ``<think>``: they are excluded. Other
    differences - the template, special roles of tokens, how text is split - do not matter if both
    have the same tokens, since one tokenizer encodes for both; they are noted.

    Args:
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.

    Raises:
        InputError: A token has two ids, an id has two tokens, or tokenizers with extra tokens split
            text differently; the message names the first differences.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if not ours:
        raise InputError("the tokenizers of teacher and student are both empty")
    notes = tuple(_notes(teacher, student))
    if ours == theirs:
        return TokenizerMatch(max(ours.values()) + 1, notes)
    shared = ours.keys() & theirs.keys()
    alone = {**theirs, **ours}.items() - {token: ours[token] for token in shared}.items()
    same_ids = all(ours[token] == theirs[token] for token in shared)
    # Extra tokens have ids above all shared ones; otherwise they would take ids of the other.
    highest = max((theirs[token] for token in shared), default=-1)
    lowest = min((number for _, number in alone), default=-1)
    if not same_ids or not 0 <= highest < lowest or not _cuts_alike(teacher, student):
        raise InputError(_difference(theirs, ours))
    return TokenizerMatch(lowest, notes, dict(sorted(alone, key=lambda item: item[1])))


def tokens_from(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    """Return the tokens with ids from a number on, by id."""
    above = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    return dict(sorted(above.items(), key=lambda item: item[1]))


def _cuts_alike(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> bool:
    """Return whether two tokenizers differ only in extra tokens, and not in how they split text."""
    if not (teacher.is_fast and student.is_fast):
        return list(teacher(_PROBE)["input_ids"]) == list(student(_PROBE)["input_ids"])
    own, other = (
        json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (student, teacher)
    )
    parts = ("normalizer", "pre_tokenizer", "decoder")
    return all(own.get(part) == other.get(part) for part in parts) and own["model"].get(
        "merges"
    ) == other["model"].get("merges")


def _difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    tokens = {t for t in teacher.keys() | student.keys() if teacher.get(t) != student.get(t)}
    highest = len(teacher) + len(student)

    def lowest_id(token: str) -> tuple[int, str]:
        return min(teacher.get(token, highest), student.get(token, highest)), token

    first = sorted(tokens, key=lowest_id)[:_SHOWN]
    shown = "; ".join(
        f"{token!r} (teacher {_id(teacher, token)}, student {_id(student, token)})"
        for token in first
    )
    return (
        f"the tokenizers of teacher and student differ in {len(tokens)} "
        f"{'token' if len(tokens) == 1 else 'tokens'}: "
        f"{shown}{'; ...' if len(tokens) > _SHOWN else ''}; one side may lack tokens only above "
        "all shared ids; use a student with the teacher's tokenizer (kdrun init-student makes one)"
    )


def _id(vocabulary: dict[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "missing"


def _notes(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> Iterator[str]:
    for role in ("bos_token", "eos_token"):
        theirs, ours = getattr(teacher, role), getattr(student, role)
        if theirs != ours:
            yield f"the {role} is {ours!r}, as for the student; for the teacher it is {theirs!r}"
    if teacher.chat_template != student.chat_template:
        if student.chat_template:
            yield "the chat templates differ; the student's is used for both"
        else:
            yield (
                "the student has no chat template and the teacher has one; the plain prompt format "
                "is used for both"
            )
    if teacher(_PROBE)["input_ids"] != student(_PROBE)["input_ids"]:
        yield "the tokenizers split text differently; the student's is used for both"
