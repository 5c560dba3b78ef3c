"""Which teacher a run trains with and measures against: a live one, a cache, or both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kdrun.cache.manifest import read_manifest
from kdrun.config import KD_RATIO, RunConfig
from kdrun.data.prepare import examples_in
from kdrun.data.rows import TextRow
from kdrun.errors import InputError
from kdrun.pairs import describe_model, load_teacher, open_teacher
from kdrun.paths import expand_home

if TYPE_CHECKING:
    from kdlosses import TokenLoss
    from kdrun.cache.teacher import CachedTeacher
    from kdrun.data.prepare import Examples, RawRows
    from kdrun.models.heads import FrozenTeacher, Teacher
    from kdrun.pairs import Pair


@dataclass(frozen=True)
class ChosenTeacher:
    """The teacher of a run.

    Attributes:
        training: what is distilled; None trains on the data alone.
        evaluation: what held-out rows are compared with; None where nothing gives full
            distributions of them.
        widths: by ``"teacher"`` the entries of its head, for the note on padded heads.
        notes: what is to be said about it, a line each.
    """

    training: Teacher | None = None
    evaluation: Teacher | None = None
    widths: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_cached_rows(config: RunConfig, rows: RawRows) -> None:
    """Refuse a cache that is not whole, or rows that change from epoch to epoch; loads nothing.

    Raises:
        InputError: with the cure.
    """
    if config.model.teacher_cache is None:
        return
    read_manifest(expand_home(config.model.teacher_cache))
    if isinstance(rows.train[0], TextRow) and config.data.shift_windows:
        raise InputError(
            "model.teacher_cache: plain text is cut at other places in each epoch, which no cache "
            "can follow; add --set data.shift_windows=false"
        )


def choose_teacher(
    config: RunConfig, pair: Pair, examples: Examples, loss: TokenLoss
) -> ChosenTeacher:
    """Load the teacher of a run, or open its cache and check that it is the right one.

    Args:
        config: of the run.
        pair: its models.
        examples: its rows.
        loss: the run's loss, unchunked.

    Raises:
        InputError: a cache of another tokenizer or teacher, one that lacks a training row, or one
            that the loss has no meaning with.
    """
    if config.model.teacher_cache is None:
        live = open_teacher(pair, config.model)
        if live is None:
            return ChosenTeacher()
        width = int(live.model.get_output_embeddings().weight.shape[0])
        note = f"teacher: {describe_model(live.model)}"
        return ChosenTeacher(live, live, {"teacher": width}, (note,))
    return _choose_cached(config.model.teacher_cache, config, pair, examples, loss)


def _choose_cached(
    folder: str, config: RunConfig, pair: Pair, examples: Examples, loss: TokenLoss
) -> ChosenTeacher:
    cached = _open(folder, config, pair, examples, loss)
    live = _named_teacher(cached, config, pair)
    evaluation: Teacher | None = live
    reason = (
        cached.missing(examples_in(examples.held_out))
        if cached.exact
        else "only part of it was kept"
    )
    if reason is None:
        evaluation, note = cached, "held-out rows are measured against it too"
    elif live is not None:
        note = f"held-out rows are measured against {pair.teacher}"
    else:
        note = (
            "held-out rows are measured without the teacher, whose measures are null "
            f"({reason}); name it with --teacher to have them"
        )
    return ChosenTeacher(
        cached,
        evaluation,
        {"teacher": cached.width},
        (f"teacher: {describe_cache(cached)}", note),
    )


def check_cache(config: RunConfig, pair: Pair, examples: Examples, loss: TokenLoss) -> str:
    """Open a run's cache and check that it is the right one; no model is loaded.

    Returns:
        What it holds, in one line.

    Raises:
        InputError: as :func:`choose_teacher`, a live teacher's weights excepted.
    """
    folder = config.model.teacher_cache
    assert folder is not None
    return describe_cache(_open(folder, config, pair, examples, loss))


def _open(
    folder: str, config: RunConfig, pair: Pair, examples: Examples, loss: TokenLoss
) -> CachedTeacher:
    from kdrun.cache.read import Cache
    from kdrun.cache.teacher import CachedTeacher

    cached = CachedTeacher(Cache(folder), pair.tokenizer, config.model.dtype)
    if config.loss.kd_ratio > 0 or KD_RATIO in config.loss.schedules:
        _check_training(cached, config, examples, loss)
    return cached


def describe_cache(cached: CachedTeacher) -> str:
    """What a cache holds, in one line."""
    manifest = cached.cache.manifest
    kept = {
        "hidden": "hidden states",
        "top_k": f"top {manifest.entries} and a tail",
        "sampled": f"{manifest.entries} draws a token",
    }[manifest.kind]
    return (
        f"{cached.cache.folder}, {kept} of {manifest.teacher_name} for {manifest.rows} rows, "
        f"{manifest.tokens} tokens"
    )


def _check_training(
    cached: CachedTeacher, config: RunConfig, examples: Examples, loss: TokenLoss
) -> None:
    if not cached.exact and "temperature" in config.loss.schedules:
        raise InputError(
            f"{cached.cache.folder} was compressed at one temperature, and loss.schedules moves "
            "it; build a cache of --kind hidden, which serves every temperature"
        )
    cached.check_loss(loss)
    reason = cached.missing(examples_in(examples.train))
    if reason is not None:
        raise InputError(reason)


def _named_teacher(cached: CachedTeacher, config: RunConfig, pair: Pair) -> FrozenTeacher | None:
    """The live teacher, where one is named as well, once it has proved to be the cached one."""
    import torch

    from kdrun.cache.fingerprint import print_teacher
    from kdrun.models.heads import FrozenTeacher, find_split

    stored_as = config.model.model_copy(update={"dtype": cached.cache.manifest.dtype})
    model = load_teacher(pair, stored_as)
    if model is None:
        return None
    cached.cache.check_teacher(print_teacher(model), str(pair.teacher))
    model = model.to(getattr(torch, config.model.dtype))
    return FrozenTeacher(model, find_split(model))
