"""Adds to datasets' map: rows as training or held-out examples, with notes on the others."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from kdrun.data.chat import ChatRenderer
from kdrun.data.encode import LongRows, encode
from kdrun.data.encode_report import report_on
from kdrun.data.encoding import Encoding, Example
from kdrun.data.given import has_reasoning
from kdrun.data.lazy import Lazy
from kdrun.data.origins import Origins
from kdrun.data.parallel import run_in_order, usual_workers
from kdrun.data.records import Position
from kdrun.data.row_store import BATCH, Places, Rows, store_rows
from kdrun.data.rows import BadRow, ChatRow, Row, TextRow, describe_bad_rows
from kdrun.data.templates import USUAL_RENDERING, Rendering, read_template, uses_date
from kdrun.data.token_cache import TokenCache, token_key
from kdrun.data.token_store import Chunk, Tokens, pack_chunk, store_tokens
from kdrun.data.view import View, view_of
from kdrun.errors import InputError
from kdrun.quiet import make_console, show_progress

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.data_section import DataConfig

_ROWS_FOR_A_WORKER = 4 * BATCH
"""Fewer rows are encoded sooner than another process is started."""


class Kept(Lazy[Any]):
    """Some rows of a data set.

    Args:
        rows: the data set.
        numbers: numbers of the rows to keep.

    Attributes:
        rows: the same.
        numbers: the same.
    """

    def __init__(self, rows: Any, numbers: Sequence[int]) -> None:
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def element(self, number: int) -> Any:
        """Return one of them."""
        return self.rows[self.numbers[number]]


def _knows_not(token: str) -> str:
    return f"has the token {token!r}, which only one of the models knows"


@dataclass(frozen=True)
class Encoded:
    """Examples, notes about them, and their origins."""

    examples: Dataset[Any]
    notes: list[str]
    origins: Origins


@dataclass(frozen=True)
class Encoder:
    """Encodes rows as examples.

    Attributes:
        tokenizer: encodes them.
        max_length: tokens per row, or per window of plain text.
        long_rows: what to do with longer conversations.
        cache: keeps encoded rows for the next run.
        rendering: settings that determine the text of conversations besides the template.
        left_out: tokens, with their ids, that only one model knows; rows with them are skipped.
        strict: refuse rows that the chat template rejects or does not write in full.
        workers: number of processes; None is one for each core.
        view: how the teacher's conversations are encoded; None as the student's.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    long_rows: LongRows = "cut"
    cache: TokenCache = field(default_factory=lambda: TokenCache(None))
    rendering: Rendering = USUAL_RENDERING
    left_out: Mapping[str, int] = field(default_factory=dict)
    strict: bool = False
    workers: int | None = None
    view: View | None = None

    @classmethod
    def of(
        cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase, left_out: Mapping[str, int]
    ) -> Encoder:
        """Return the encoder of a configuration.

        Args:
            data: how rows are tokenised.
            tokenizer: encodes them.
            left_out: tokens, with their ids, that only one model knows.

        The tokenizer gets the chat template of ``data.template``, which is saved with it.

        Raises:
            InputError: ``data.cache_dir`` cannot be written, or the template is broken.
        """
        if data.template is not None:
            tokenizer.chat_template = read_template(
                data.template, tokenizer, data.template_arguments
            )
        return cls(
            tokenizer,
            data.max_length,
            data.long_rows,
            TokenCache.at(data.cache_dir),
            Rendering.of(data),
            left_out,
            data.strict,
            data.workers,
            view_of(data),
        )

    def __call__(self, given: Sequence[Row], seed: int, phase: bool, part: str) -> Encoded:
        """Encode rows.

        Args:
            given: all texts, or all conversations.
            seed: decides where windows of text start.
            phase: whether they shift from epoch to epoch.
            part: ``training`` or ``held-out``, for messages.

        Raises:
            InputError: none fits ``max_length``, or with ``strict`` one is incomplete.
        """
        rows = store_rows(given)
        if isinstance(rows[0], ChatRow):
            return self._chats(rows, part)
        # Imported here because this module also reads rows, before torch is needed.
        from kdrun.data.windows import TextWindows, check_end_of_text

        check_end_of_text(self.tokenizer)
        tokens = self.texts(rows, part)
        unknown = _unknown(rows, tokens.encoding())
        if not len(tokens):
            raise InputError(
                f"{unknown[0].position}: no text can be used; this one {unknown[0].reason}"
            )
        try:
            windows = TextWindows(tokens.flat(), self.max_length, seed=seed, phase=phase)
        except ValueError as error:
            raise InputError(f"{error} Pass more text, or lower --max-length.") from error
        note = f"{len(tokens)} documents, {len(windows)} windows of {self.max_length} tokens"
        return Encoded(windows, [note, *describe_bad_rows(unknown, len(rows))], Origins())

    def chats(self, rows: Sequence[Row], part: str = "") -> Tokens:
        """Return the tokens of conversations, from the cache if it has them.

        Args:
            rows: conversations.
            part: ``training`` or ``held-out``, for the display of progress.
        """
        return self._encode(_encode_chats, store_rows(rows), part)

    def texts(self, rows: Sequence[Row], part: str = "") -> Tokens:
        """Return the tokens of texts, from the cache if it has them.

        Args:
            rows: texts.
            part: ``training`` or ``held-out``, for the display of progress.
        """
        return self._encode(_encode_texts, store_rows(rows), part)

    def some(self, rows: Sequence[Row]) -> list[tuple[dict[str, Any], Position]]:
        """Return the examples of a few conversations, with their positions."""
        _, kept, known, _ = _encode_some(self, rows)
        pairs = zip(kept, known, strict=True)
        return [({**example}, rows[number].position) for example, number in pairs]

    def notes_on_template(self, rows: Sequence[Row]) -> list[str]:
        """Return notes about the chat template, independent of the rows."""
        if (
            isinstance(rows[0], ChatRow)
            and ChatRenderer(self.tokenizer, self.rendering).reads_parts
        ):
            return [
                "the chat template accepts only lists of parts; each text is passed as one part"
            ]
        return []

    def _chats(self, rows: Rows, part: str) -> Encoded:
        tokens = self.chats(rows, part)
        encoding = tokens.encoding()
        unknown = _unknown(rows, encoding)
        if unknown and not len(tokens):
            raise InputError(
                f"{unknown[0].position}: no row can be used; this one {unknown[0].reason}"
            )
        report = report_on(
            rows,  # type: ignore[arg-type]
            encoding,
            self.max_length,
            self.rendering.rendered,
            self.strict,
            part,
        ).report
        summary = (
            f"{report.kept} of {report.rows} rows, {report.tokens} tokens, "
            f"{report.supervised_tokens} supervised"
        )
        if encoding.teacher_tokens:
            summary += f"; the teacher reads its own prompts, {encoding.teacher_tokens} tokens"
        thoughts = len(encoding.reasoning)
        if thoughts:
            fate = "learned" if self.rendering.reasoning == "keep" else "left out"
            summary += f"; {thoughts} of {len(rows)} rows have reasoning, which is {fate}"
        notes = [summary, *report.warnings(), *describe_bad_rows(unknown, len(rows))]
        examples: Any = tokens
        return Encoded(examples, notes, Origins(Places(rows, tokens.rows())))

    def _encode(self, function: Callable[[_Job, int], Chunk], rows: Rows, part: str) -> Tokens:
        """Encode rows in worker processes, unless a store has them already."""
        place = self._place(function.__name__, rows)
        found = None if place is None else Tokens.at(place)
        if found is not None:
            return found
        most = usual_workers() if self.workers is None else self.workers
        workers = max(1, min(most, len(rows) // _ROWS_FOR_A_WORKER))
        starts = range(0, len(rows), BATCH)
        job = _Job(replace(self, cache=TokenCache(None)), rows)
        chunks = run_in_order(function, job, starts, workers)
        worth_showing = len(rows) >= 2 * _ROWS_FOR_A_WORKER
        return store_tokens(place, _shown(chunks, rows, part) if worth_showing else chunks)

    def _place(self, kind: str, rows: Rows) -> Any:
        day = None
        if uses_date(self.tokenizer):
            day = self.rendering.date or date.today().isoformat()
        view = self.view
        seen = None if view is None else [view.max_length, view.rendering.key, view.is_given]
        settings = [self.max_length, self.long_rows, self.rendering.key, day, sorted(self.left_out)]
        settings.append(seen)
        key = token_key(self.tokenizer, [kind, rows.fingerprint(), settings])
        cache = self.cache if key is not None else TokenCache(None)
        return cache.place("tokens", lambda: key or uuid.uuid4().hex, rows.characters())


def _unknown(rows: Rows, encoding: Encoding) -> list[BadRow]:
    """Return the rows with a token that only one model knows."""
    return [BadRow(rows.position(number), _knows_not(token)) for number, token in encoding.unknown]


@dataclass(frozen=True)
class _Job:
    """What the workers share."""

    encoder: Encoder
    rows: Rows


def _encode_chats(job: _Job, start: int) -> Chunk:
    """Encode the conversations from a row on."""
    own = job.encoder
    rows: Any = job.rows[start : start + BATCH]
    found, kept, known, unknown = _encode_some(own, rows)
    left = {number for number, _ in unknown}
    notes: dict[str, list[Any]] = {
        "skipped": [(start + n, reason) for n, reason in found.skipped],
        "cut": [start + n for n in found.cut if n not in left],
        "lost": [(start + n, kind) for n, kind in found.lost],
        "controls": [(start + n, token) for n, token in found.controls],
        "unknown": [(start + n, token) for n, token in unknown],
        "rewritten": [start + n for n in found.rewritten if n not in left],
        "reasoning": [start + n for n, row in enumerate(rows) if has_reasoning(row.messages)],
    }
    return pack_chunk(kept, [start + n for n in known], notes, found.shortest)


def _encode_some(
    own: Encoder, rows: Any
) -> tuple[Encoding, list[Example], list[int], list[tuple[int, str]]]:
    """Encode conversations.

    Returns:
        What became of them, the examples, the row of each, and the rows with a token that only one
        model knows.
    """
    found = encode(rows, own.tokenizer, own.max_length, own.long_rows, own.rendering, own.view)
    skipped = {number for number, _ in found.skipped}
    numbers = [number for number in range(len(rows)) if number not in skipped]
    return found, *_known(found.examples, numbers, own.left_out)


def _encode_texts(job: _Job, start: int) -> Chunk:
    """Encode the documents from a row on, each ended by the end-of-text token."""
    from kdrun.data.windows import concatenate

    own = job.encoder
    examples, numbers, unknown = [], [], []
    for number, row in enumerate(job.rows[start : start + BATCH], start):
        assert isinstance(row, TextRow), "texts are not mixed with conversations"
        token = next((token for token in own.left_out if token in row.text), None)
        if token is not None:
            unknown.append((number, token))
            continue
        ids = concatenate([row.text], own.tokenizer)
        examples.append(Example(input_ids=ids, labels=ids))
        numbers.append(number)
    return pack_chunk(examples, numbers, {"unknown": unknown})


def _known(
    examples: Sequence[Example], numbers: Sequence[int], left_out: Mapping[str, int]
) -> tuple[list[Example], list[int], list[tuple[int, str]]]:
    """Return examples without tokens that only one model knows, their rows, and the others."""
    if not left_out:
        return list(examples), list(numbers), []
    names = {number: token for token, number in left_out.items()}
    kept, known, unknown = [], [], []
    for number, example in zip(numbers, examples, strict=True):
        read = (*example["input_ids"], *example.get("teacher_input_ids", ()))
        found = next((token for token in read if token in names), None)
        if found is None:
            kept.append(example)
            known.append(number)
        else:
            unknown.append((number, names[found]))
    return kept, known, unknown


def _shown(chunks: Iterator[Chunk], rows: Rows, part: str) -> Iterator[Chunk]:
    """Show the progress of encoding."""
    done = 0
    with show_progress(make_console(), f"{part} rows", "rows") as report:
        for chunk in chunks:
            done = min(len(rows), done + BATCH)
            report(done, len(rows), done)
            yield chunk
