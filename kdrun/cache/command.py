"""``kdrun cache-teacher``: build the teacher cache for the configuration of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.cache.choose import settle_date
from kdrun.cache.manifest import MANIFEST, Kind
from kdrun.cache.write import make_folder, prepare_folder
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import encode_rows, examples_in, read_rows
from kdrun.errors import InputError
from kdrun.files import hold_folder
from kdrun.models.attention import check_attention
from kdrun.models.device import find_device
from kdrun.models.pairs import check_context, describe_model, find_pair, locate_pair, open_teacher
from kdrun.quiet import make_console, quiet_libraries, show_progress

if TYPE_CHECKING:
    from kdrun.config.sections import DataConfig, ModelConfig


def cache_teacher(
    model: ModelConfig,
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
        data: section with the rows and their maximum length.
        temperature: temperature of ``top_k`` and ``sampled``.
        seed: seed of the draws.
        batch_size: rows per batch of the teacher.
        folder: folder of the cache.
        kind: what to store.
        entries: k, or the number of draws.

    Raises:
        InputError: wrong input; no cache is written.
        TrainingError: the disk fails.
    """
    _check(model)
    locate_pair(model)
    rows = read_rows(data)
    make_folder(folder)
    console = make_console()
    with hold_folder(folder), quiet_libraries():
        prepare_folder(folder)
        import torch

        from kdrun.cache.build import Recipe, build_cache

        pair = find_pair(model)
        check_context(pair, data.max_length, model.trust_remote_code)
        data = settle_date(data, None, pair.tokenizer)
        encoder = Encoder.of(data, pair.tokenizer, pair.left_out)
        examples = encode_rows(rows, encoder, seed, shift_windows=False)
        for note in (*pair.notes, *rows.notes, *examples.notes):
            console.print(note, markup=False)
        teacher = open_teacher(pair, model, lambda line: console.print(line, markup=False))
        assert teacher is not None
        console.print(f"teacher: {describe_model(teacher.model)}", markup=False)
        teacher.to(torch.device(model.teacher_device or find_device()))
        recipe = Recipe(
            kind=kind,
            entries=entries,
            temperature=temperature,
            seed=seed,
            vocab_size=pair.vocab_size,
            max_length=data.max_length,
            batch_size=batch_size,
            date=data.date,
        )
        every = (*examples_in(examples.train), *examples_in(examples.held_out))
        started = time.monotonic()
        with show_progress(console, "row", "tokens") as report:
            manifest = build_cache(
                folder, teacher, _name(model), pair.tokenizer, every, recipe, report
            )
    seconds = time.monotonic() - started
    size = sum(file.bytes for file in manifest.files) + (folder / MANIFEST).stat().st_size
    if manifest.kept_mass is not None:
        console.print(
            f"the {manifest.entries} stored tokens cover {manifest.kept_mass:.4f} of the teacher's "
            f"probability at temperature {manifest.temperature:g}, on average"
        )
    console.print(
        f"{manifest.rows} different rows, {manifest.tokens} supervised tokens in {seconds:.0f} s "
        f"({manifest.tokens / seconds:.0f} tokens/s), {size / 1e6:.1f} MB on disk"
    )
    console.print(f"cache: {folder}", markup=False)


def _check(model: ModelConfig) -> None:
    """Refuse models that cannot be cached, without loading anything."""
    if model.teacher is None:
        raise InputError("--teacher: pass the teacher to cache")
    if model.teacher_quantization is not None:
        raise InputError(
            "model.teacher_quantization: a cache cannot store a quantised teacher; remove it"
        )
    check_attention(model)
    if model.teacher_device == "auto":
        raise InputError("model.teacher_device=auto: there is no student; remove it, or pass cpu")


def _name(model: ModelConfig) -> str:
    """The teacher's name in messages about the cache."""
    at = "" if model.teacher_revision is None else f"@{model.teacher_revision}"
    return f"{model.teacher}{at}"
