"""From a configuration to the training and held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.builtin.text import load_text
from kdrun.config import BUILT_IN, DataConfig
from kdrun.data.encode import encode_chats
from kdrun.data.rows import ChatRow, Position, Row, RowSet, TextRow, load_rows
from kdrun.data.split import hold_out
from kdrun.errors import InputError

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Examples:
    """Encoded training and held-out examples.

    Attributes:
        train: examples with ``input_ids`` and ``labels``.
        held_out: likewise, for evaluation.
        notes: what was read, skipped and cut, a line each.
    """

    train: Dataset[Any]
    held_out: Dataset[Any]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RawRows:
    """Training and held-out rows before they are tokens.

    Attributes:
        train: rows to learn from.
        held_out: rows to measure on.
        notes: what was read and left out, a line each.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    notes: tuple[str, ...]


def read_rows(config: DataConfig) -> RawRows:
    """Read and split the rows of a run; nothing heavy is imported.

    Raises:
        InputError: nothing usable, naming the file and the cure.
    """
    notes: list[str] = []
    if config.train == BUILT_IN:
        text = load_text()
        notes.append(
            f"built-in text: topics of pydoc_data.topics, sha256 {text.sha256[:12]} "
            "(figures depend on it)"
        )
        train: Sequence[Any] = _documents(text.train)
        held_out: Sequence[Any] = _documents(text.held_out)
    else:
        found = _load(config.train, config)
        notes += found.warnings()
        train = found.rows
        if config.eval is None:
            train, held_out = hold_out(found.rows)
    if config.eval is not None:
        evaluation = _load(config.eval, config)
        notes += evaluation.warnings()
        held_out = evaluation.rows
    if config.part == "test" and config.test is not None:
        test = _load(config.test, config)
        notes += test.warnings()
        held_out = test.rows
    elif config.part != "all" and config.test is None:
        validation, test_rows = hold_out(held_out, 0.5)
        held_out = validation if config.part == "validation" else test_rows
    return RawRows(train, held_out, tuple(notes))


def read_held_out(source: str, config: DataConfig) -> tuple[Sequence[Any], list[str]]:
    """All rows of a source to measure on, and notes on them.

    Of the built-in text it is the held-out part.

    Raises:
        InputError: nothing usable, naming the file and the cure.
    """
    if source == BUILT_IN:
        return _documents(load_text().held_out), []
    found = _load(source, config)
    return found.rows, found.warnings()


def encode_rows(
    rows: RawRows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    shift_windows: bool = True,
) -> Examples:
    """Turn rows into examples.

    Args:
        rows: training and held-out rows.
        tokenizer: encodes them.
        max_length: tokens a row, or a window of plain text.
        seed: decides where windows start.
        shift_windows: whether the windows of training text move from epoch to epoch.

    Raises:
        InputError: no row fits ``max_length``.
    """
    train, training_notes = _encode(rows.train, tokenizer, max_length, seed, shift_windows)
    held_out, held_out_notes = encode_held_out(rows.held_out, tokenizer, max_length)
    notes = [
        *(f"training rows: {line}" for line in training_notes),
        *(f"held-out rows: {line}" for line in held_out_notes),
    ]
    return Examples(train, held_out, tuple(notes))


def examples_in(data: Any) -> Iterator[Mapping[str, Sequence[int]]]:
    """The examples of a data set, in its order; of moving windows those of the present epoch."""
    return (data[index] for index in range(len(data)))


def encode_held_out(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset[Any], list[str]]:
    """Rows to measure on as examples, and notes on them; windows of text stay in their places.

    Raises:
        InputError: no row fits ``max_length``.
    """
    return _encode(rows, tokenizer, max_length, seed=0, phase=False)


def _documents(texts: Sequence[str]) -> list[TextRow]:
    return [
        TextRow(text, Position("pydoc_data.topics", number)) for number, text in enumerate(texts, 1)
    ]


def _load(source: str, config: DataConfig) -> RowSet:
    return load_rows(
        source,
        data_format=config.format,
        prompt_field=config.prompt_field,
        response_field=config.response_field,
        strict=config.strict,
    )


def _encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    phase: bool,
) -> tuple[Dataset[Any], list[str]]:
    if isinstance(rows[0], ChatRow):
        encoded = encode_chats(rows, tokenizer, max_length)  # type: ignore[arg-type]
        report = encoded.report
        summary = (
            f"{report.kept} of {report.rows} rows, {report.tokens} tokens, "
            f"{report.supervised_tokens} supervised"
        )
        return encoded.examples, [summary, *report.warnings()]  # type: ignore[return-value]
    # Imported here: this module also reads rows, before torch is needed.
    from kdrun.data.windows import TextWindows, concatenate

    tokens = concatenate([row.text for row in rows], tokenizer)  # type: ignore[union-attr]
    try:
        windows = TextWindows(tokens, max_length, seed=seed, phase=phase)
    except ValueError as error:
        raise InputError(f"{error} Give more text, or a smaller --max-length.") from error
    return windows, [f"{len(rows)} documents, {len(windows)} windows of {max_length} tokens"]
