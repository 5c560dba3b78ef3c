"""Encode texts and conversations as training or held-out examples, with notes on the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.data.chat import USUAL_RENDERING, ChatRenderer, Rendering
from kdrun.data.encode import LongRows, encode
from kdrun.data.encode_report import report_on
from kdrun.data.origins import Origins
from kdrun.data.rows import BadRow, ChatRow, Position, Row, TextRow, describe_bad_rows
from kdrun.data.token_cache import TokenCache
from kdrun.errors import InputError

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.sections import DataConfig


class Kept(Sequence[Any]):
    """Some rows of a data set.

    Args:
        rows: the data set.
        numbers: numbers of the rows to keep.
    """

    def __init__(self, rows: Any, numbers: Sequence[int]) -> None:
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """Return one of them."""
        return self._rows[self._numbers[index]]


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
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    long_rows: LongRows = "cut"
    cache: TokenCache | None = None
    rendering: Rendering = USUAL_RENDERING
    left_out: Mapping[str, int] = field(default_factory=dict)
    strict: bool = False

    @classmethod
    def of(
        cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase, left_out: Mapping[str, int]
    ) -> Encoder:
        """Return the encoder of a configuration.

        Args:
            data: how rows are tokenised.
            tokenizer: encodes them.
            left_out: tokens, with their ids, that only one model knows.

        Raises:
            InputError: ``data.cache_dir`` cannot be written.
        """
        return cls(
            tokenizer,
            data.max_length,
            data.long_rows,
            TokenCache.at(data.cache_dir),
            Rendering.of(data),
            left_out,
            data.strict,
        )

    def __call__(self, rows: Sequence[Row], seed: int, phase: bool, part: str) -> Encoded:
        """Encode rows.

        Args:
            rows: all texts, or all conversations.
            seed: decides where windows of text start.
            phase: whether they shift from epoch to epoch.
            part: ``training`` or ``held-out``, for messages.

        Raises:
            InputError: none fits ``max_length``, or with ``strict`` one is incomplete.
        """
        if isinstance(rows[0], ChatRow):
            return self._chats(rows, part)  # type: ignore[arg-type]
        # Imported here because this module also reads rows, before torch is needed.
        from kdrun.data.windows import TextWindows

        length = self.max_length
        rows, skipped = self._without_left_out(rows)
        tokens = self._text([row.text for row in rows])
        try:
            windows = TextWindows(tokens, length, seed=seed, phase=phase)
        except ValueError as error:
            raise InputError(f"{error} Pass more text, or lower --max-length.") from error
        note = f"{len(rows)} documents, {len(windows)} windows of {length} tokens"
        return Encoded(windows, [note, *skipped], Origins())

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

    def _without_left_out(self, rows: Sequence[Any]) -> tuple[list[TextRow], list[str]]:
        """Return the texts without tokens that only one model knows, and a note on the others."""
        bad = []
        for row in rows if self.left_out else ():
            token = next((token for token in self.left_out if token in row.text), None)
            if token is not None:
                bad.append(BadRow(row.position, _knows_not(token)))
        places = {row.position for row in bad}
        kept = [row for row in rows if row.position not in places]
        if not kept:
            raise InputError(f"{bad[0].position}: no text can be used; this one {bad[0].reason}")
        return kept, describe_bad_rows(bad, len(rows))

    def _chats(self, rows: Sequence[ChatRow], part: str) -> Encoded:
        settings = (rows, self.tokenizer, self.max_length, self.long_rows, self.rendering)
        encoding = encode(*settings) if self.cache is None else self.cache.chats(*settings)
        encoded = report_on(
            rows, encoding, self.max_length, self.rendering.rendered, self.strict, part
        )
        report = encoded.report
        summary = (
            f"{report.kept} of {report.rows} rows, {report.tokens} tokens, "
            f"{report.supervised_tokens} supervised"
        )
        skipped = {number for number, _ in encoding.skipped}
        kept = [row.position for number, row in enumerate(rows) if number not in skipped]
        notes = [summary, *report.warnings()]
        examples: Any = encoded.examples
        if self.left_out:
            examples, kept, more = self._known(examples, kept)
            notes += more
        return Encoded(examples, notes, Origins(kept))

    def _known(
        self, examples: Any, positions: list[Position]
    ) -> tuple[Any, list[Position], list[str]]:
        """Return examples without tokens that only one model knows, and a note on the others."""
        names = {number: token for token, number in self.left_out.items()}
        numbers, bad = [], []
        for number, example in enumerate(examples):
            found = next((token for token in example["input_ids"] if token in names), None)
            if found is None:
                numbers.append(number)
            else:
                bad.append(BadRow(positions[number], _knows_not(names[found])))
        if not bad:
            return examples, positions, []
        if not numbers:
            raise InputError(f"{bad[0].position}: no row can be used; this one {bad[0].reason}")
        kept = [positions[number] for number in numbers]
        return Kept(examples, numbers), kept, describe_bad_rows(bad, len(examples))

    def _text(self, texts: Sequence[str]) -> list[int]:
        from kdrun.data.windows import concatenate

        if self.cache is None:
            return concatenate(texts, self.tokenizer)
        return self.cache.text(texts, self.tokenizer)
