"""``kdrun cache-teacher``: build the teacher cache for the configuration of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.cache.choose import settle_date
from kdrun.cache.manifest import MANIFEST, Kind
from kdrun.cache.resume import read_plan
from kdrun.cache.write import make_folder, prepare_folder
from kdrun.data.collate import teacher_side
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import encode_rows, examples_in, read_rows
from kdrun.errors import InputError, Interrupted, Stopped, signal_of
from kdrun.files import hold_folder
from kdrun.models.address import is_address
from kdrun.models.attention import check_attention
from kdrun.models.device import find_device
from kdrun.models.pairs import check_context, describe_model, find_pair, locate_pair, open_teacher
from kdrun.models.self_teacher import refuse_self
from kdrun.quiet import make_console, quiet_libraries, show_progress

if TYPE_CHECKING:
    from kdrun.cache.outputs import TeacherOutputs
    from kdrun.config.data_section import DataConfig
    from kdrun.config.sections import ModelConfig
    from kdrun.config.served_section import ServedConfig
    from kdrun.models.pairs import Pair

_SHOWN = 8
"""Rows that a server must tokenise as the student does."""


def cache_teacher(
    model: ModelConfig,
    served: ServedConfig,
    data: DataConfig,
    temperature: float,
    seed: int,
    batch_size: int,
    folder: Path,
    kind: Kind,
    entries: int,
) -> None:
    """Cache the teacher of a run on its training and held-out rows.

    Args:
        model: section with the teacher, its data type, and the student, whose tokenizer is used.
        served: section of the server, if one has the teacher.
        data: section with the rows and their maximum length.
        temperature: temperature of ``top_k`` and ``sampled``.
        seed: seed of the draws.
        batch_size: rows per batch of the teacher.
        folder: folder of the cache.
        kind: what to store.
        entries: k, or the number of draws.

    Raises:
        InputError: wrong input, or the folder of the unfinished build of another cache; nothing is
            written or removed.
        TrainingError: the disk fails; the finished rows are kept.
        Interrupted: a signal stopped the build; the finished rows are kept.
    """
    _check(model)
    locate_pair(model)
    rows = read_rows(data)
    make_folder(folder)
    console = make_console()

    def say(line: str) -> None:
        console.print(line, markup=False)

    with hold_folder(folder), quiet_libraries():
        prepare_folder(folder)
        from kdrun.cache.build import Recipe, build_cache

        begun = read_plan(folder)
        pair = find_pair(model)
        check_context(pair, data.max_length, model.trust_remote_code, data.teacher_length)
        if is_address(model.teacher):  # before the rows are tokenised, which may take long
            from kdrun.served.probe import greet

            greet(model, served, data.teacher_length, say)
        if begun is not None and data.date is None:  # it may have begun on another day
            data = data.model_copy(update={"date": begun.date})
        data = settle_date(data, None, pair.tokenizer)
        encoder = Encoder.of(data, pair.tokenizer, pair.left_out)
        examples = encode_rows(rows, encoder, seed, shift_windows=False)
        for note in (*pair.notes, *rows.notes, *examples.notes):
            console.print(note, markup=False)
        both = (examples.train, examples.held_out)
        every = tuple(teacher_side(one) for part in both for one in examples_in(part))

        if is_address(model.teacher):
            if kind == "top_k":
                served = served.model_copy(update={"top_k": entries})
            outputs = _served(model, served, pair, every, data.teacher_length, temperature, say)
        else:
            outputs = _local(model, pair, say)
        recipe = Recipe(
            kind=kind,
            entries=entries,
            temperature=temperature,
            seed=seed,
            vocab_size=pair.vocab_size,
            max_length=data.teacher_length,
            batch_size=batch_size,
            date=data.date,
        )
        tokens, started = 0, time.monotonic()
        with show_progress(console, "row", "tokens") as show, _told_how_to_go_on(folder):

            def report(rows: int, total: int, computed: int) -> None:
                nonlocal tokens
                tokens = computed
                show(rows, total, computed)

            manifest = build_cache(
                folder,
                outputs,
                pair.tokenizer,
                every,
                recipe,
                report,
                say,
            )
    seconds = time.monotonic() - started
    size = sum(file.bytes for file in manifest.files) + (folder / MANIFEST).stat().st_size
    if manifest.kept_mass is not None:
        console.print(
            f"the {manifest.entries} stored tokens cover {manifest.kept_mass:.4f} of the teacher's "
            f"probability at temperature {manifest.temperature:g}, on average"
        )
    console.print(
        f"{manifest.rows} different rows, {manifest.tokens} supervised tokens, {size / 1e6:.1f} MB "
        f"on disk; {tokens} tokens computed in {seconds:.0f} s ({tokens / seconds:.0f} tokens/s)"
    )
    console.print(f"cache: {folder}", markup=False)


def _local(model: ModelConfig, pair: Pair, say: Callable[[str], None]) -> TeacherOutputs:
    import torch

    from kdrun.cache.outputs import local_outputs

    teacher = open_teacher(pair, model, say)
    assert teacher is not None
    say(f"teacher: {describe_model(teacher.model)}")
    teacher.to(torch.device(model.teacher_device or find_device()))
    return local_outputs(teacher, _name(model))


def _served(
    model: ModelConfig,
    served: ServedConfig,
    pair: Pair,
    rows: Sequence[Mapping[str, Sequence[int]]],
    max_length: int,
    temperature: float,
    say: Callable[[str], None],
) -> TeacherOutputs:
    """Open a server, as the one process that asks it."""
    from kdrun.cache.outputs import served_outputs
    from kdrun.served.probe import open_served

    shown = [row["input_ids"] for row in rows[:_SHOWN]]
    tokenizer, size = pair.tokenizer, pair.vocab_size
    teacher = open_served(model, served, tokenizer, size, shown, max_length, temperature, 1, say)
    what = "hidden states" if teacher.exact else "its most likely tokens"
    say(f"teacher: {teacher.asked.model} at {model.teacher}, {what}")
    return served_outputs(teacher, str(model.teacher), tokenizer)


@contextmanager
def _told_how_to_go_on(folder: Path) -> Iterator[None]:
    """Say how to continue a build that a signal stops."""
    try:
        yield
    except KeyboardInterrupt as error:
        said = error if isinstance(error, Stopped) else "interrupted"
        raise Interrupted(
            f"{said}; the finished rows are kept in {folder}: give the same command again to go on",
            signal_of(error),
        ) from error


def _check(model: ModelConfig) -> None:
    """Refuse models that cannot be cached, without loading anything."""
    if model.teacher is None:
        raise InputError("--teacher: pass the teacher to cache")
    if model.teacher_quantization is not None:
        raise InputError(
            "model.teacher_quantization: a cache cannot store a quantised teacher; remove it"
        )
    refuse_self(model.teacher, "cache-teacher")
    check_attention(model)
    if model.teacher_device == "auto":
        raise InputError("model.teacher_device=auto: there is no student; remove it, or pass cpu")


def _name(model: ModelConfig) -> str:
    """The teacher's name in messages about the cache."""
    at = "" if model.teacher_revision is None else f"@{model.teacher_revision}"
    return f"{model.teacher}{at}"
