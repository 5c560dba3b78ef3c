"""Adds to datasets: rows on screen with their supervised tokens marked, counts and lengths."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kdrun.data.collate import IGNORE_INDEX, teacher_side
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import sources_of
from kdrun.data.rows import ChatRow, load_sources

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.data_section import DataConfig
    from kdrun.data.token_store import Tokens

_LOOKED_AT = 10_000
_BARS, _WIDTH = 8, 40
_OPEN, _CLOSE = "[[", "]]"
_LEARNED = "bold green"


def show_rows(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    console: Console,
    prompts: bool = False,
) -> None:
    """Show the training rows of a configuration.

    Args:
        data: names the rows.
        tokenizer: encodes them.
        count: rows to show in full.
        console: where they are shown; without colour, brackets mark supervised tokens.
        prompts: whether rows without answers will do.

    Raises:
        InputError: no row can be used.
    """
    sources = sources_of(data.sources or data.train, data, prompts)
    found = load_sources(sources, strict=data.strict, limit=_LOOKED_AT)
    for note in found.warnings():
        console.print(note, markup=False)
    more = f", the first {_LOOKED_AT} of each source" if found.records >= _LOOKED_AT else ""
    console.print(
        f"{len(found.rows)} rows of {found.records}, format {found.data_format}{more}", markup=False
    )
    encoder = Encoder.of(data, tokenizer, {})
    if not isinstance(found.rows[0], ChatRow):
        tokens = encoder.texts(found.rows)
        _show_first(tokens, found.rows, tokenizer, count, console)
        console.print(f"{int(tokens.lengths().sum())} tokens of plain text, all supervised")
        return
    encoded = encoder(found.rows, 0, False, "")
    examples: Any = encoded.examples
    _show_first(examples, found.rows, tokenizer, count, console)
    for note in encoded.notes:
        console.print(note, markup=False)
    _show_lengths(examples, console)


def _show_first(
    tokens: Tokens, rows: Any, tokenizer: PreTrainedTokenizerBase, count: int, console: Console
) -> None:
    colours = console.color_system is not None
    how = "in colour" if colours else f"in {_OPEN}double brackets{_CLOSE}"
    console.print(f"supervised tokens are shown {how}\n", markup=False)
    for number, row in zip(range(min(count, len(tokens))), tokens.rows(), strict=False):
        console.print(Text(str(rows.position(int(row))), style="dim"))
        console.print(_marked(tokens[number], tokenizer, colours))
        if "teacher_input_ids" in tokens[number]:
            console.print(Text("the teacher reads", style="dim"))
            console.print(_marked(teacher_side(tokens[number]), tokenizer, colours))
        console.print()


def _marked(example: Any, tokenizer: PreTrainedTokenizerBase, colours: bool) -> Text:
    """Return the text of an example with its supervised tokens marked."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    text = Text()
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        piece = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        if not learned:
            text.append(piece)
        elif colours:
            text.append(piece, style=_LEARNED)
        else:
            text.append(f"{_OPEN}{piece}{_CLOSE}")
    return text


def _show_lengths(tokens: Tokens, console: Console) -> None:
    """Show how many rows have how many tokens."""
    import numpy as np

    lengths = tokens.lengths()
    counts, edges = np.histogram(lengths, bins=_BARS, range=(0, int(lengths.max())))
    console.print("\ntokens per row")
    for number, first, last in islice(zip(counts, edges, edges[1:], strict=False), _BARS):
        bar = "#" * round(_WIDTH * number / counts.max())
        console.print(f"{int(first):>7} to {int(last):<7}{number:>8} {bar}", markup=False)
