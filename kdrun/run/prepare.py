"""Tokenizers and examples of a run, prepared before weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.cache.choose import settle_date
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import (
    Examples,
    RawRows,
    encode_rows,
    mix_training,
    pack_training,
    stream_training,
)
from kdrun.models.address import is_address
from kdrun.models.pairs import Pair, check_context, find_pair
from kdrun.models.self_teacher import is_self
from kdrun.models.stored import check_plain
from kdrun.run.features import check_features_view
from kdrun.run.procedure import leave_room, read_text
from kdrun.run.processes import World
from kdrun.run.view import check_procedure_view

if TYPE_CHECKING:
    from kdrun.config.data_section import DataConfig
    from kdrun.config.sections import RunConfig
    from kdrun.procedures.sampling import Sampling


@dataclass(frozen=True)
class Prepared:
    """A run before its weights are loaded.

    Attributes:
        data: section ``data``, including the date for templates.
        pair: teacher and student with their tokenizer.
        examples: encoded training and held-out rows.
        held_out: the rows to evaluate on, before tokenisation.
        sampling: how a procedure's answers are sampled; None without one.
        text: windows of plain text for a procedure that uses them.
    """

    data: DataConfig
    pair: Pair
    examples: Examples
    held_out: Sequence[Any]
    sampling: Sampling | None
    text: Any


def prepare(config: RunConfig, rows: RawRows, say: Callable[[str], None]) -> Prepared:
    """Compare the tokenizers and turn the rows into examples.

    Args:
        config: names the pair, and says how rows are tokenised and answers are sampled.
        rows: rows of the run.
        say: called with lines about the pair's differences and the rows.

    Raises:
        InputError: the models are incompatible, the student cannot be trained, or no row can be
            used.
    """
    model, data, procedure = config.model, config.data, config.procedure
    seed = config.training.seed
    pair = find_pair(model)
    check_plain(pair.student, model.trust_remote_code)
    check_context(
        pair,
        data.max_length,
        model.trust_remote_code,
        data.teacher_length,
        is_self(model.teacher),
    )
    if is_address(model.teacher):  # before the rows are tokenised, which may take long
        from kdrun.served.probe import greet

        greet(model, config.served, data.teacher_length, say)
    data = settle_date(data, model.teacher_cache, pair.tokenizer)
    encoder = Encoder.of(data, pair.tokenizer, pair.left_out)
    with World().main_first():
        examples = encode_rows(rows, encoder, seed, data.shift_windows)
    check_features_view(config, examples)
    if data.packing:
        examples = pack_training(examples, data.max_length, data.teacher_length)
    sampling = None
    if procedure.spec is not None:
        from kdrun.procedures.sampling import Sampling

        check_procedure_view(procedure.spec, examples)
        sampling = Sampling.of(procedure, data.max_length, data.teacher_length)
        examples = leave_room(examples, sampling, pair.tokenizer)
    if data.streaming:
        examples = stream_training(examples, data, encoder, seed)
    if data.sources and data.sources[0].weight is not None:
        examples = mix_training(examples, rows.train, data.sources, seed)
    text, of_text = read_text(procedure.text, encoder)
    for note in (*pair.notes, *rows.notes, *examples.notes, *of_text):
        say(note)
    return Prepared(data, pair, examples, rows.held_out, sampling, text)
