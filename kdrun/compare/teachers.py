"""The teacher caches of a comparison: each teacher runs once, and every trial reads its cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.cache.choose import check_cache, settle_date
from kdrun.cache.manifest import MANIFEST, Manifest, read_manifest
from kdrun.compare.ledger import Ledger
from kdrun.compare.plan import Part
from kdrun.compare.record import Pair, Trial
from kdrun.compare.run import Comparison
from kdrun.config.sections import RunConfig
from kdrun.data.collate import teacher_side
from kdrun.data.encoder import Encoder
from kdrun.data.prepare import encode_rows, examples_in, read_rows
from kdrun.data.rows import TextRow
from kdrun.errors import InputError
from kdrun.models.device import find_device
from kdrun.models.pairs import find_pair, open_teacher
from kdrun.run.precision import settle_precision

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.models.pairs import Pair as Models

CACHES = "teacher-cache"
SPARE_BYTES = 2**30
"""Free space to keep besides a cache: for records, logs, and the student of a trial."""


def cache_teachers(
    comparison: Comparison, ledger: Ledger, trials: Iterable[Trial], console: Console
) -> Mapping[Pair, Path]:
    """Find or build an exact cache for each pair that has trials to run.

    A cache is stored in the comparison's folder under a name derived from the teacher, the
    tokenizer and the rows, so it is found again even if the folder was moved. Processes that start
    together build it once. An interrupted build is continued.

    Args:
        comparison: the comparison.
        ledger: the ledger of its folder.
        trials: trials that have not run.
        console: prints which caches are built, and which pairs use the live teacher.

    Returns:
        The caches; a pair without one runs its teacher in every trial.

    Raises:
        InputError: a teacher cannot be loaded.
        TrainingError: the disk fails.
    """
    pairs = dict.fromkeys(trial.arm.pair for trial in trials)
    if not comparison.cached or not pairs:
        return {}
    parts = comparison.plan.parts
    rows = read_rows(comparison.base.data).train
    if isinstance(rows[0], TextRow):
        if comparison.base.data.shift_windows:
            console.print(
                "no teacher cache, because data.shift_windows=true cuts plain text at different "
                "places in each epoch; every trial runs its teacher"
            )
            return {}
        console.print(
            "data.shift_windows=false: plain text is cut at the same places in every epoch, as a "
            "teacher cache requires"
        )
    found = {}
    for pair in pairs:
        folder = _find_or_build(comparison.base, pair, parts, ledger, console)
        if folder is not None:
            found[pair] = folder
    return found


def check_named_cache(comparison: Comparison) -> None:
    """Refuse a cache given by the user that does not work for every trial.

    Raises:
        InputError: names the loss, the row or the teacher that the cache does not support.
    """
    from kdrun.losses.build import plain_objective

    base, axes = comparison.base, comparison.plan.axes
    if base.model.teacher_cache is None:
        return
    if len(axes.teachers) > 1:
        raise InputError(
            f"model.teacher_cache={base.model.teacher_cache}: contains one teacher, but "
            "--teacher is given several times; remove the cache"
        )
    for student in axes.students:
        model = base.model.model_copy(update={"teacher": axes.teachers[0], "student": student})
        loss = base.loss.model_copy(update={"kd_ratio": axes.kd_ratios[0]})
        models = find_pair(model)
        data = settle_date(base.data, base.model.teacher_cache, models.tokenizer)
        encoder = Encoder.of(data, models.tokenizer, models.left_out)
        examples = encode_rows(read_rows(data), encoder, base.training.seed, shift_windows=False)
        for spec in axes.losses:
            plain = plain_objective(loss.model_copy(update={"spec": spec}), base.token_weight)
            check_cache(model, loss, models, examples, plain)


def _find_or_build(
    base: RunConfig, pair: Pair, parts: Sequence[Part], ledger: Ledger, console: Console
) -> Path | None:
    teacher, student = pair
    model = base.model.model_copy(update={"teacher": teacher, "student": student})
    base = settle_precision(base.model_copy(update={"model": model}))
    models = find_pair(model)
    name = _name(base, models, parts)
    folder = ledger.folder / CACHES / name
    with ledger.hold(f"{CACHES}-{name}"):
        manifest = _complete(folder, console) or _build(folder, base, models, parts, console)
    if manifest is None:
        return None
    size = sum(file.bytes for file in manifest.files)
    console.print(
        f"teacher cache: {folder}, {manifest.rows} rows, {manifest.tokens} tokens, "
        f"{size / 1e6:.1f} MB; every trial of {teacher} reads it",
        markup=False,
    )
    return folder


def _name(base: RunConfig, models: Models, parts: Sequence[Part]) -> str:
    """A short hash that identifies a cache within a folder.

    It does not include the teacher's weights, because the declaration contains a fingerprint of
    every model.
    """
    from kdrun.cache.fingerprint import print_tokenizer

    content: dict[str, Any] = {
        "teacher": base.model.teacher,
        "dtype": base.model.teacher_type,
        "data": base.data.model_dump(mode="json"),
        "parts": parts,
        "tokenizer": print_tokenizer(models.tokenizer).model_dump(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _complete(folder: Path, console: Console) -> Manifest | None:
    """The manifest of a complete cache; a damaged one loses its manifest, so that it is built."""
    if not folder.is_dir():
        return None
    try:
        return read_manifest(folder)
    except InputError as error:
        console.print(f"{str(error).partition(';')[0]}; building what is missing", markup=False)
        (folder / MANIFEST).unlink(missing_ok=True)
        return None


def _build(
    folder: Path, base: RunConfig, models: Models, parts: Sequence[Part], console: Console
) -> Manifest | None:
    """Run the teacher to build its cache; if impossible, print the reason and return None."""
    import torch

    from kdrun.cache.build import Recipe, SpaceError, build_cache
    from kdrun.cache.outputs import local_outputs
    from kdrun.quiet import show_progress

    teacher = open_teacher(models, base.model)
    assert teacher is not None
    name = str(base.model.teacher)
    reason = teacher.split.reason
    if reason is None:
        teacher.to(find_device())
        recipe = Recipe(
            kind="hidden",
            entries=0,
            temperature=1.0,
            seed=0,
            vocab_size=models.vocab_size,
            max_length=base.data.teacher_length,
            batch_size=base.training.batch_size,
            date=base.data.date,
        )
        every = _examples(base, models, parts)
        try:
            with show_progress(console, "row", "tokens") as report:
                return build_cache(
                    folder,
                    local_outputs(teacher, name),
                    models.tokenizer,
                    every,
                    recipe,
                    report,
                    lambda line: console.print(line, markup=False),
                    spare_bytes=SPARE_BYTES,
                )
        except SpaceError as error:
            with suppress(OSError):  # it stays if an interrupted build left rows in it
                folder.rmdir()
            reason = f"{error.shortage}, and {SPARE_BYTES / 1e6:.0f} MB are reserved for the trials"
        finally:
            if torch.cuda.is_available():
                teacher.to(torch.device("cpu"))
                torch.cuda.empty_cache()
    console.print(
        f"no teacher cache of {name}: {reason}; every trial runs this teacher", markup=False
    )
    return None


def _examples(
    base: RunConfig, models: Models, parts: Sequence[Part]
) -> Iterator[Mapping[str, Sequence[int]]]:
    """The training rows, followed by the rows for evaluation."""
    encoder = Encoder.of(base.data, models.tokenizer, models.left_out)
    for number, part in enumerate(parts):
        rows = read_rows(base.data.model_copy(update={"part": part}))
        examples = encode_rows(rows, encoder, base.training.seed, shift_windows=False)
        if number == 0:
            yield from map(teacher_side, examples_in(examples.train))
        yield from map(teacher_side, examples_in(examples.held_out))
