"""Choose the teacher of a run for training and evaluation: a live teacher, a cache, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING

from kdrun.cache.manifest import read_manifest
from kdrun.config.sections import KD_RATIO
from kdrun.data.prepare import examples_in
from kdrun.data.rows import TextRow
from kdrun.data.templates import uses_date
from kdrun.errors import InputError
from kdrun.models.cast import cast_weights
from kdrun.models.pairs import describe_model, load_teacher, open_teacher
from kdrun.models.placement import teacher_devices
from kdrun.paths import expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdlosses import KDObjective
    from kdrun.cache.teacher import CachedTeacher
    from kdrun.config.data_section import DataConfig
    from kdrun.config.sections import LossConfig, ModelConfig
    from kdrun.data.prepare import Examples, RawRows
    from kdrun.models.heads import FrozenTeacher, Teacher
    from kdrun.models.pairs import Pair
    from kdrun.served.teacher import ServedTeacher


@dataclass(frozen=True)
class ChosenTeacher:
    """The teacher of a run.

    Attributes:
        training: the teacher for training; None trains on the data alone.
        evaluation: the teacher for held-out rows; None if no full distributions are available.
        widths: under ``"teacher"``, the size of its head, for the note on padded heads.
        notes: lines to print.
    """

    training: Teacher | None = None
    evaluation: Teacher | None = None
    widths: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def close(self) -> None:
        """End requests to a server."""
        from kdrun.served.teacher import ServedTeacher

        if isinstance(self.training, ServedTeacher):
            self.training.close()


def check_cached_rows(cache: str | None, shift_windows: bool, rows: RawRows) -> None:
    """Refuse an incomplete cache, or rows that change between epochs, without loading anything.

    Args:
        cache: folder of the cache; None checks nothing.
        shift_windows: whether windows of plain text differ between epochs.
        rows: rows of the run.

    Raises:
        InputError: states the problem and the cure.
    """
    if cache is None:
        return
    read_manifest(expand_home(cache))
    if isinstance(rows.train[0], TextRow) and shift_windows:
        raise InputError(
            "model.teacher_cache: plain text is cut at different places in each epoch, which a "
            "cache does not support; add --set data.shift_windows=false"
        )


def settle_date(
    data: DataConfig, cache: str | None, tokenizer: PreTrainedTokenizerBase
) -> DataConfig:
    """Set the date of the rows, if the chat template includes the date.

    Args:
        data: section of the data, which may set the date.
        cache: teacher cache, whose rows contain its date.
        tokenizer: the tokenizer with the template.

    Returns:
        The section with the date of the cache, or today's date.

    Raises:
        InputError: the cache is incomplete, or its date differs from the given one.
    """
    if not uses_date(tokenizer):
        return data
    cached = None if cache is None else read_manifest(expand_home(cache)).date
    if cached is not None and data.date not in (None, cached):
        raise InputError(
            f"{cache}: its rows were rendered with the date {cached}, but data.date={data.date}; "
            "remove data.date, or build the cache again"
        )
    day = data.date or cached or date.today().isoformat()
    return data.model_copy(update={"date": day})


def choose_teacher(
    model: ModelConfig,
    distilled: LossConfig,
    pair: Pair,
    examples: Examples,
    objective: KDObjective,
) -> ChosenTeacher:
    """Load the teacher of a run, or open its cache and check that it fits the run.

    Args:
        model: section with the teacher, its cache, or both.
        distilled: section of the loss.
        pair: the models of the run.
        examples: the rows of the run.
        objective: that of the run, unchunked.

    Raises:
        InputError: the cache is for another tokenizer or teacher, lacks a training row, or does
            not support the loss.
    """
    if model.teacher_cache is None:
        notes: list[str] = []
        live = open_teacher(pair, model, notes.append)
        if live is None:
            return ChosenTeacher()
        width = int(live.model.get_output_embeddings().weight.shape[0])
        note = f"teacher: {describe_model(live.model)}"
        return ChosenTeacher(live, live, {"teacher": width}, (*notes, note))
    return _choose_cached(model, distilled, pair, examples, objective)


def check_loss(teacher: CachedTeacher | ServedTeacher, objective: KDObjective, name: str) -> None:
    """Refuse a loss that a teacher does not support; an exact one supports every loss.

    Args:
        teacher: gives full distributions, or the most likely or drawn tokens.
        objective: the loss and its token weight, unchunked to avoid compilation.
        name: of the teacher in the message.

    Raises:
        InputError: another temperature, or a loss that needs the teacher's full distribution.
    """
    import torch

    if teacher.exact:
        return
    source = teacher.empty_source(torch.Size([1]))
    device = source.tensors[0].device
    student = torch.zeros(1, teacher.width, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        objective(student, source, labels)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _choose_cached(
    model: ModelConfig,
    distilled: LossConfig,
    pair: Pair,
    examples: Examples,
    objective: KDObjective,
) -> ChosenTeacher:
    cached = _open(model, distilled, pair, examples, objective)
    notes: list[str] = []
    live = _named_teacher(cached, model, pair, notes.append)
    evaluation: Teacher | None = live
    reason = (
        cached.missing(examples_in(examples.held_out)) if cached.exact else "the cache is not exact"
    )
    if reason is None:
        evaluation, note = cached, "held-out rows are also evaluated against it"
    elif live is not None:
        note = f"held-out rows are evaluated against {pair.teacher}"
    else:
        note = (
            "held-out rows are evaluated without the teacher, so measures that need it are null "
            f"({reason}); pass --teacher to include them"
        )
    return ChosenTeacher(
        cached,
        evaluation,
        {"teacher": cached.width},
        (*notes, f"teacher: {describe_cache(cached)}", note),
    )


def check_cache(
    model: ModelConfig,
    distilled: LossConfig,
    pair: Pair,
    examples: Examples,
    objective: KDObjective,
) -> str:
    """Open the cache of a run and check that it fits the run, without loading a model.

    Returns:
        A one-line description of the cache.

    Raises:
        InputError: as in :func:`choose_teacher`, except for the weights of a live teacher.
    """
    return describe_cache(_open(model, distilled, pair, examples, objective))


def _open(
    model: ModelConfig,
    distilled: LossConfig,
    pair: Pair,
    examples: Examples,
    objective: KDObjective,
) -> CachedTeacher:
    from kdrun.cache.read import Cache
    from kdrun.cache.teacher import CachedTeacher

    assert model.teacher_cache is not None, "a cache is given"
    cached = CachedTeacher(Cache(model.teacher_cache), pair.tokenizer, model.teacher_type)
    if distilled.kd_ratio > 0 or KD_RATIO in distilled.schedules:
        _check_training(cached, distilled, examples, objective)
    return cached


def describe_cache(cached: CachedTeacher) -> str:
    """A one-line description of a cache."""
    manifest = cached.cache.manifest
    kept = {
        "hidden": "hidden states",
        "top_k": f"top {manifest.entries} and a tail bucket",
        "sampled": f"{manifest.entries} draws per token",
    }[manifest.kind]
    return (
        f"{cached.cache.folder}, {kept} of {manifest.teacher_name} for {manifest.rows} rows, "
        f"{manifest.tokens} tokens"
    )


def _check_training(
    cached: CachedTeacher, distilled: LossConfig, examples: Examples, objective: KDObjective
) -> None:
    if not cached.exact and "temperature" in distilled.schedules:
        raise InputError(
            f"{cached.cache.folder} was compressed at one temperature, but loss.schedules changes "
            "it; build a cache with --kind hidden, which works for every temperature"
        )
    check_loss(cached, objective, str(cached.cache.folder))
    reason = cached.missing(examples_in(examples.train))
    if reason is not None:
        raise InputError(reason)


def _named_teacher(
    cached: CachedTeacher, named: ModelConfig, pair: Pair, say: Callable[[str], None]
) -> FrozenTeacher | None:
    """Load the live teacher, if one is given, and check that it is the cached teacher."""
    import torch

    from kdrun.cache.fingerprint import print_teacher
    from kdrun.models.heads import FrozenTeacher, find_split

    stored_as = named.model_copy(update={"teacher_dtype": cached.cache.manifest.dtype})
    model = load_teacher(pair, stored_as, say)
    if model is None:
        return None
    cached.cache.check_teacher(print_teacher(model), str(pair.teacher))
    if named.teacher_type != cached.cache.manifest.dtype:  # quantised weights cannot be converted
        cast_weights(model, getattr(torch, named.teacher_type))
    return FrozenTeacher(model, find_split(model), teacher_devices(named.teacher_device))
