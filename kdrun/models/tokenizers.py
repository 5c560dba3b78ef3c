"""Loading tokenizers, and whether those of two models are one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    """Load a tokenizer; no weights are read, except that a GGUF file holds both.

    Args:
        name_or_folder: A folder or a hub name, or a `ModelSource`, whose GGUF file then counts.
        gguf_file: The name of a GGUF file in it that holds the tokenizer.
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
        # transformers would make an empty tokenizer of the model's type, and say nothing.
        raise InputError(
            f"{source} holds no tokenizer; save one into the folder (tokenizer.json or the like)"
        )
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with one_clear_line(source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, **options
        )
    return tokenizer


def _tokenizer_source(source: ModelSource) -> ModelSource:
    """The outermost adapter that brings a tokenizer, or else the base model."""
    for folder in reversed(source.adapters):
        if _holds_tokenizer(Path(folder)):
            return ModelSource(folder)
    return source.base


def _holds_tokenizer(folder: Path) -> bool:
    return any(entry.name.startswith(_FILE_STARTS) for entry in folder.iterdir())


@dataclass(frozen=True)
class TokenizerMatch:
    """Two tokenizers that give every token the same id.

    Attributes:
        vocab_size: How many logits both models need: one more than the highest id, which is the
            tokenizer's length where its ids have no gaps.
        notes: Differences that do not matter for distilling, one line each. The student's
            tokenizer encodes for both models.
    """

    vocab_size: int
    notes: tuple[str, ...] = ()


def compare_tokenizers(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> TokenizerMatch:
    """Check that both tokenizers give every token the same id, added tokens included.

    A teacher's distribution means something to the student only where both call the same token by
    the same id. What else differs - the template, the special roles of tokens, how a text is cut
    into tokens - does not stop that, since one tokenizer encodes for both; it is noted.

    Args:
        teacher: The teacher's tokenizer.
        student: The student's tokenizer.

    Raises:
        InputError: A token differs; the message names the first ones and both their ids.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        raise InputError(_difference(theirs, ours))
    if not ours:
        raise InputError("the tokenizers of teacher and student are both empty")
    return TokenizerMatch(max(ours.values()) + 1, tuple(_notes(teacher, student)))


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
        f"{'token' if len(tokens) == 1 else 'tokens'}: {shown}"
        f"{'; ...' if len(tokens) > _SHOWN else ''}; use a student with the teacher's tokenizer "
        "(kdrun init-student makes one)"
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
        yield "the tokenizers cut texts in different ways; the student's is used for both"
