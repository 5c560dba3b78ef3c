"""From a configuration to the training and held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.builtin.text import load_text
from kdrun.config import BUILT_IN, DataConfig
from kdrun.data.encode import encode_chats
from kdrun.data.rows import ChatRow, Position, RowSet, TextRow, load_rows
from kdrun.data.split import hold_out
from kdrun.data.windows import TextWindows, concatenate
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


def prepare_examples(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """Read, split and encode the data of a run.

    Raises:
        InputError: nothing usable, naming the file and the cure.
    """
    if config.train == BUILT_IN:
        text = load_text()
        note = f"built-in text: topics of pydoc_data.topics, sha256 {text.sha256[:12]}"
        train: Sequence[Any] = _documents(text.train)
        held_out: Sequence[Any] = _documents(text.held_out)
        notes = [f"{note} (figures depend on it)"]
    else:
        rows = _load(config.train, config)
        notes = rows.warnings()
        train = rows.rows
        if config.eval is None:
            train, held_out = hold_out(rows.rows)
    if config.eval is not None:
        evaluation = _load(config.eval, config)
        notes += evaluation.warnings()
        held_out = evaluation.rows
    datasets = []
    for name, chosen in (("training", train), ("held-out", held_out)):
        dataset, more = _encode(chosen, tokenizer, config, seed, training=name == "training")
        datasets.append(dataset)
        notes += [f"{name} rows: {line}" for line in more]
    return Examples(datasets[0], datasets[1], tuple(notes))


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
    rows: Sequence[TextRow] | Sequence[ChatRow],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    seed: int,
    training: bool,
) -> tuple[Dataset[Any], list[str]]:
    if isinstance(rows[0], ChatRow):
        encoded = encode_chats(rows, tokenizer, config.max_length)  # type: ignore[arg-type]
        report = encoded.report
        summary = (
            f"{report.kept} of {report.rows} rows, {report.tokens} tokens, "
            f"{report.supervised_tokens} supervised"
        )
        return encoded.examples, [summary, *report.warnings()]  # type: ignore[return-value]
    tokens = concatenate([row.text for row in rows], tokenizer)  # type: ignore[union-attr]
    try:
        windows = TextWindows(tokens, config.max_length, seed=seed, phase=training)
    except ValueError as error:
        raise InputError(f"{error} Give more text, or a smaller --max-length.") from error
    return windows, [f"{len(rows)} documents, {len(windows)} windows of {config.max_length} tokens"]
