"""Adds to datasets: training and held-out examples of a run from its section ``data``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kdrun.builtin.text import load_text
from kdrun.config.base import BUILT_IN
from kdrun.config.data_section import DataConfig, SourceConfig, Sources
from kdrun.data.origins import Origins
from kdrun.data.row_store import Rows, store_rows
from kdrun.data.rows import (
    LOOKED_AT,
    Position,
    Row,
    RowSet,
    SourceOf,
    TextRow,
    load_sources,
)
from kdrun.data.split import hold_out, shared_prompts, shared_rows
from kdrun.data.teacher_prompt import TeacherPrompt
from kdrun.data.token_cache import TokenCache
from kdrun.data.token_store import Tokens
from kdrun.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.data import Dataset

    from kdrun.data.encoder import Encoder
    from kdrun.data.stream import StreamedRows


@dataclass(frozen=True)
class Examples:
    """Encoded training and held-out examples.

    Attributes:
        train: examples with ``input_ids`` and ``labels``.
        held_out: the same for evaluation.
        notes: what was read, skipped and cut, one line each.
        origins: origins of the training examples.
        held_out_origins: origins of the held-out examples.
        stream: what is trained on instead of ``train``, which are then its first rows.
    """

    train: Dataset[Any]
    held_out: Dataset[Any]
    notes: tuple[str, ...]
    origins: Origins
    held_out_origins: Origins = field(default_factory=Origins)
    stream: StreamedRows | None = None


@dataclass(frozen=True)
class RawRows:
    """Training and held-out rows before tokenisation.

    Attributes:
        train: rows to learn from.
        held_out: rows to evaluate on.
        notes: what was read and skipped, one line each.
    """

    train: Rows
    held_out: Rows
    notes: tuple[str, ...]


def read_rows(config: DataConfig, prompts: bool = False) -> RawRows:
    """Read and split the rows of a run, without heavy imports.

    Args:
        config: names the rows.
        prompts: whether training rows without answers will do.

    Raises:
        InputError: no row is usable; names the file and the cure.
    """
    notes: list[str] = []
    if config.train == BUILT_IN and not config.sources:
        text = load_text()
        notes.append(
            f"built-in text: topics of pydoc_data.topics, sha256 {text.sha256[:12]} "
            "(figures depend on it)"
        )
        train, held_out = _documents(text.train), _documents(text.held_out)
    else:
        found = _load_training(config, prompts)
        notes += found.warnings()
        train = found.rows
        if config.streaming:
            notes.append(
                f"training rows: streamed; the checks see the first {len(train)}, and later rows "
                "that cannot be used are passed over"
            )
        if config.eval is None:
            train, held_out = hold_out(found.rows, by=config.hold_out)
    if config.eval is not None:
        evaluation = _load(config.eval, config)
        notes += evaluation.warnings()
        held_out = evaluation.rows
    if config.part == "test" and config.test is not None:
        test = _load(config.test, config)
        notes += test.warnings()
        held_out = test.rows
    elif config.part != "all" and config.test is None:
        validation, test_rows = _halve(held_out, config)
        held_out = validation if config.part == "validation" else test_rows
    same, shared = shared_rows(train, held_out), shared_prompts(train, held_out)
    if same:
        notes.append(
            f"held-out rows: {same} of {len(held_out)} are also training rows, so the measures "
            "flatter the student; pass others with --eval-data"
        )
    if shared > same:
        notes.append(
            f"held-out rows: {shared - same} of {len(held_out)} have the same prompt as a training "
            "row, which flatters the student"
        )
    return RawRows(train, held_out, tuple(notes))


def _load_training(config: DataConfig, prompts: bool) -> RowSet:
    given = config.sources or config.train
    found = _load(given, config, config.streaming, prompts)
    if not found.unanswered or config.eval is not None:
        return found
    if found.unanswered == found.records - len(found.bad):
        raise InputError(
            f"{found.source}: rows without answers cannot be evaluated on; pass held-out rows "
            "with answers (--eval-data)"
        )
    # Rows are held out by their content, so that all must be rows to evaluate on.
    return _load(given, config, config.streaming)


def _halve(held_out: Rows, config: DataConfig) -> tuple[Rows, Rows]:
    """Return the held-out rows for selection, and those for reporting."""
    if len(set(held_out.hashes("own"))) < 2:
        raise InputError(
            f"{held_out[0].position.file}: data.part={config.part} takes half of the held-out "
            "rows, so at least two must differ; add rows, or put the test rows in data.test"
        )
    return hold_out(held_out, 0.5, config.hold_out)


def read_held_out(source: Sources, config: DataConfig) -> tuple[Rows, list[str]]:
    """Read all rows of a source to evaluate on, and notes on them.

    For the built-in text, this is the held-out part.

    Raises:
        InputError: no row is usable; names the file and the cure.
    """
    if source == BUILT_IN:
        return _documents(load_text().held_out), []
    found = _load(source, config)
    return found.rows, found.warnings()


def check_packed_rows(config: DataConfig, rows: RawRows) -> None:
    """Refuse to pack plain text, without encoding anything.

    Raises:
        InputError: the rows are plain text.
    """
    if config.packing and isinstance(rows.train[0], TextRow):
        raise InputError(
            "data.packing: the training rows are plain text, whose windows are already full; "
            "remove it"
        )


def mix_training(
    examples: Examples, rows: Rows, sources: Sequence[SourceConfig], seed: int
) -> Examples:
    """Mix the training examples of several sources by their weights.

    Raises:
        InputError: the rows are plain text, or no row of a source can be used.
    """
    from kdrun.data.encoder import Kept
    from kdrun.data.mixture import MixedPlaces, mix

    found: Any = examples.train
    tokens = found.rows if isinstance(found, Kept) else found
    if not isinstance(tokens, Tokens):
        raise InputError("data.sources: plain text cannot be mixed by weights; remove the weights")
    groups = rows.sources()[tokens.rows()]
    if isinstance(found, Kept):
        groups = groups[list(found.numbers)]
    for number, source in enumerate(sources):
        if not (groups == number).any():
            raise InputError(f"{source.path}: none of its rows can be used for training")
    weights = [source.weight or 0.0 for source in sources]
    names = [source.path for source in sources]
    mixture, notes = mix(found, groups, weights, seed, names)
    positions = examples.origins.positions
    assert positions is not None, "conversations have positions"
    origins = replace(examples.origins, positions=MixedPlaces(mixture, positions))
    mixed: Any = mixture
    return replace(examples, train=mixed, notes=(*examples.notes, *notes), origins=origins)


def pack_training(
    examples: Examples, max_length: int, teacher_max_length: int | None = None
) -> Examples:
    """Pack training examples into rows; held-out ones are unchanged.

    Args:
        examples: the examples.
        max_length: maximum number of tokens in a row.
        teacher_max_length: the same of what the teacher reads.
    """
    import numpy as np

    from kdrun.data.pack import Packed, arrange

    loose: Any = examples.train
    lengths = lengths_of(loose)
    if teacher_max_length is not None and isinstance(loose, Tokens):
        # Both of a row's sequences must fit: the fuller one counts.
        scaled = -(-loose.teacher_lengths() * max_length // teacher_max_length)
        members = arrange(np.maximum(lengths, scaled), max_length)
    else:
        members = arrange(lengths, max_length)
    packed: Any = Packed(loose, members)
    filled = lengths.sum() / (len(packed) * max_length)
    note = (
        f"training rows: packed into {len(packed)} rows of up to {max_length} tokens, which are "
        f"{filled:.0%} full"
    )
    origins = replace(examples.origins, members=members)
    return replace(examples, train=packed, notes=(*examples.notes, note), origins=origins)


def encode_rows(
    rows: RawRows, encode: Encoder, seed: int = 0, shift_windows: bool = True
) -> Examples:
    """Encode the rows of a run as examples.

    Args:
        rows: training and held-out rows.
        encode: encodes them.
        seed: decides where windows of plain text start.
        shift_windows: whether those of training text shift from epoch to epoch.

    Raises:
        InputError: no row fits the maximum length, or with ``strict`` one is incomplete.
    """
    train = encode(rows.train, seed, shift_windows, "training")
    held_out = encode(rows.held_out, 0, False, "held-out")
    notes = [
        *encode.notes_on_template(rows.train),
        *(f"training rows: {line}" for line in train.notes),
        *(f"held-out rows: {line}" for line in held_out.notes),
    ]
    return Examples(
        train.examples, held_out.examples, tuple(notes), train.origins, held_out.origins
    )


def examples_in(data: Any) -> Iterator[Mapping[str, Sequence[int]]]:
    """Return the examples of a data set in order; for shifting windows, of the current epoch."""
    return (data[index] for index in range(len(data)))


def lengths_of(data: Any) -> np.ndarray:
    """Return the number of tokens of each example of a data set."""
    import numpy as np

    if isinstance(data, Tokens):
        return data.lengths()
    return np.array([len(example["input_ids"]) for example in examples_in(data)])


def encode_held_out(rows: Sequence[Row], encode: Encoder) -> tuple[Dataset[Any], list[str]]:
    """Encode rows to evaluate on, with notes on them; windows of text do not shift.

    Raises:
        InputError: no row fits the maximum length, or with ``strict`` one is incomplete.
    """
    encoded = encode(rows, 0, False, "held-out")
    return encoded.examples, [*encoded.notes, *encode.notes_on_template(rows)]


def _documents(texts: Sequence[str]) -> Rows:
    return store_rows(
        [TextRow(text, Position("pydoc_data.topics", i)) for i, text in enumerate(texts, 1)]
    )


def sources_of(
    given: Sources | tuple[SourceConfig, ...], config: DataConfig, prompts: bool = False
) -> list[SourceOf]:
    """Return sources, and how each of them is read.

    Args:
        given: names, or sources with settings of their own.
        config: settings of the names.
        prompts: whether rows without answers will do.
    """
    names = (given,) if isinstance(given, str) else given
    fields = (config.format, config.prompt_field, config.response_field)
    teacher = TeacherPrompt.of(config)
    return [
        SourceOf(one, *fields, prompts, teacher)
        if isinstance(one, str)
        else SourceOf(one.path, one.format, one.prompt_field, one.response_field, prompts, teacher)
        for one in names
    ]


def stream_training(
    examples: Examples, config: DataConfig, encoder: Encoder, seed: int
) -> Examples:
    """Train on all rows of a stream, of which the examples are the first.

    Raises:
        InputError: they are plain text.
    """
    from kdrun.data.stream import StreamedRows

    if not isinstance(examples.train, Tokens):
        raise InputError("data.streaming=true reads conversations only; remove it for plain text")
    sources = sources_of(config.sources or config.train, config)
    stream = StreamedRows(sources, encoder, config.shuffle_buffer, seed)
    return replace(examples, stream=stream)


def _load(
    given: Sources | tuple[SourceConfig, ...],
    config: DataConfig,
    first_only: bool = False,
    prompts: bool = False,
) -> RowSet:
    sources = sources_of(given, config, prompts)
    if first_only:
        return load_sources(sources, strict=config.strict, limit=LOOKED_AT)
    return load_sources(
        sources,
        strict=config.strict,
        keep=lambda key, size: TokenCache.at(config.cache_dir).place("rows", key, size),
    )
