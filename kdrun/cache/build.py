"""Build a cache by running each distinct row through the teacher once, also in several sessions."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlosses import Logits, Projected, Sampled, TopK
from kdrun.cache.fingerprint import print_tokenizer
from kdrun.cache.manifest import HEAD, Content, Kind, Manifest, Plan, StoredFile
from kdrun.cache.outputs import Batch, Outputs, TeacherOutputs
from kdrun.cache.resume import check_plan, find_shards, gaps, hash_keys, read_plan
from kdrun.cache.rounding import round_top_k
from kdrun.cache.write import (
    SHARD_BYTES,
    SHARD_SECONDS,
    ShardWriter,
    StoredRow,
    prepare_folder,
    stored_bytes,
    write_manifest,
    write_plan,
    write_tensors,
)
from kdrun.data.batch_rows import BatchRow, rows_of
from kdrun.data.collate import Collator
from kdrun.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_LOGITS_AT_ONCE = 2**25  # elements: 128 MiB in float32


class SpaceError(InputError):
    """The cache does not fit on the disk; nothing was computed.

    Args:
        folder: folder of the cache.
        needed: size of the cache in bytes.
        free: free bytes on the disk.
    """

    def __init__(self, folder: Path, needed: int, free: int) -> None:
        self.shortage = f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        super().__init__(
            f"--output {folder}: the cache does not fit: {self.shortage}; free some space, use "
            "another disk, or use --kind top-k"
        )


@dataclass(frozen=True)
class Recipe:
    """What a cache stores of the teacher, and for which rows.

    Attributes:
        kind: ``hidden`` (exact), ``top_k`` or ``sampled``.
        entries: k, or the number of draws; not used for ``hidden``.
        temperature: temperature of the compressed kinds.
        seed: seed of the draws.
        vocab_size: number of tokens that teacher and tokenizer share.
        max_length: maximum length of the rows.
        date: the date in the rows, from the chat template.
        batch_size: rows per batch of the teacher.
    """

    kind: Kind
    entries: int
    temperature: float
    seed: int
    vocab_size: int
    max_length: int
    batch_size: int
    date: str | None = None


@dataclass(frozen=True)
class _Wanted:
    """A row to be cached: the example, its key, its length and its supervised positions."""

    example: Mapping[str, Sequence[int]]
    key: bytes
    length: int
    supervised: int


Report = Callable[[int, int, int], None]


def build_cache(
    folder: Path,
    teacher: TeacherOutputs,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Mapping[str, Sequence[int]]],
    recipe: Recipe,
    report: Report = lambda rows, total, tokens: None,
    say: Callable[[str], None] = lambda line: None,
    shard_bytes: int = SHARD_BYTES,
    shard_seconds: float = SHARD_SECONDS,
    spare_bytes: int = 0,
) -> Manifest:
    """Run rows through a teacher and store what losses need of its output.

    A build that was interrupted continues with the rows that are missing. What is stored for a row
    is the same as in a build without interruption: batches are formed of all rows before the first
    one runs, and the draws of ``sampled`` follow from the seed and the key of the row alone. Only
    the division into files may differ, because a file is also written when it reaches an age.

    Args:
        folder: a new or empty folder, or the folder of an interrupted build.
        teacher: the teacher.
        tokenizer: the tokenizer that encoded the rows.
        examples: rows with ``input_ids`` and ``labels`` (not shifted); duplicates are stored once.
        recipe: what to store.
        report: called after each batch with the finished rows, the total number of rows and the
            supervised tokens that this call has finished.
        say: called with a line about what an interrupted build left.
        shard_bytes: approximate size of a file.
        shard_seconds: age at which a smaller file is written.
        spare_bytes: space that must remain free on the disk.

    Returns:
        The manifest, which is written last.

    Raises:
        SpaceError: too little space.
        InputError: an invalid folder or recipe, or the folder of the build of another cache.
        DiskError: the disk fails.
    """
    _check_recipe(teacher, recipe)
    prepare_folder(folder)
    wanted = sorted(_different(examples), key=lambda row: -row.length)
    if not wanted:
        raise InputError("no row has a supervised token, so there is nothing to cache")
    plan = _plan(teacher, tokenizer, wanted, recipe)
    begun = read_plan(folder)
    if begun is not None:
        check_plan(folder, begun, plan)
    keys, supervised = [row.key for row in wanted], [row.supervised for row in wanted]
    kept = find_shards(folder, recipe.kind, keys, supervised, recipe.batch_size, say)
    missing = gaps(kept, len(wanted))
    _check_space(
        folder, [supervised[i] for gap in missing for i in gap], plan, teacher, spare_bytes
    )
    if begun is None:
        write_plan(folder, plan)
    else:
        there = sum(shard.file.rows for shard in kept)
        say(f"{there} of {len(wanted)} rows are there already; going on")
    head = _write_head(folder, teacher) if recipe.kind == "hidden" else None
    names = [shard.file.name for shard in kept]
    with ShardWriter(folder, names, shard_bytes, shard_seconds) as shards:
        _run(teacher, wanted, missing, recipe, shards, report)
    every = sorted([*kept, *shards.shards], key=lambda shard: shard.first)
    # fsum does not depend on the division into files.
    mass = math.fsum(mass for shard in every for mass in shard.masses)
    manifest = Manifest(
        **plan.model_dump(include=set(Content.model_fields)),
        kept_mass=mass / plan.tokens if recipe.kind == "top_k" else None,
        head=head,
        shards=tuple(shard.file for shard in every),
    )
    write_manifest(folder, manifest)
    return manifest


def _check_recipe(teacher: TeacherOutputs, recipe: Recipe) -> None:
    if recipe.kind == "hidden" and teacher.weight is None:
        reason = teacher.reason or "its output head is not available"
        raise InputError(
            f"{teacher.name}: its hidden states cannot be cached, because {reason}; use --kind "
            "top-k or --kind sampled"
        )
    if recipe.kind == "top_k" and recipe.entries > recipe.vocab_size:
        raise InputError(f"--k {recipe.entries}: the vocabulary has {recipe.vocab_size} tokens")


def _plan(
    teacher: TeacherOutputs,
    tokenizer: PreTrainedTokenizerBase,
    wanted: Sequence[_Wanted],
    recipe: Recipe,
) -> Plan:
    hidden = recipe.kind == "hidden"
    entries = recipe.entries
    if hidden:
        assert teacher.weight is not None
        entries = int(teacher.weight.shape[1])
    return Plan(
        kind=recipe.kind,
        teacher_name=teacher.name,
        teacher=teacher.fingerprint,
        tokenizer=print_tokenizer(tokenizer),
        dtype=teacher.dtype,
        logit_scale=teacher.logit_scale,
        softcap=teacher.softcap,
        vocab_size=recipe.vocab_size,
        entries=entries,
        temperature=None if hidden else recipe.temperature,
        seed=recipe.seed if recipe.kind == "sampled" else None,
        max_length=recipe.max_length,
        date=recipe.date,
        rows=len(wanted),
        tokens=sum(row.supervised for row in wanted),
        batch_size=recipe.batch_size,
        keys=hash_keys(row.key for row in wanted),
    )


def _different(examples: Iterable[Mapping[str, Sequence[int]]]) -> list[_Wanted]:
    """The distinct rows with supervised tokens."""
    found: dict[bytes, _Wanted] = {}
    alone = Collator()
    for example in examples:
        batch = alone([example])
        for row in rows_of(batch["input_ids"], batch["attention_mask"], batch["shift_labels"]):
            new = _Wanted(example, row.key, len(row.ids), len(row.positions))
            found.setdefault(row.key, new)
    return list(found.values())


def _check_space(
    folder: Path, missing: Sequence[int], plan: Plan, teacher: TeacherOutputs, spare: int
) -> None:
    """Refuse a build for whose missing rows, of so many supervised positions, there is no space."""
    head = 0
    if plan.kind == "hidden":
        assert teacher.weight is not None
        per_token, head = plan.entries * teacher.weight.element_size(), teacher.weight.nbytes
    elif plan.kind == "top_k":
        per_token = plan.entries * 6 + 4
    else:
        per_token = plan.entries * 8
    needed = stored_bytes(missing, per_token, head)
    free = shutil.disk_usage(folder).free
    if needed + spare > free:
        raise SpaceError(folder, needed, free)


def _write_head(folder: Path, teacher: TeacherOutputs) -> StoredFile:
    assert teacher.weight is not None
    tensors = {"weight": teacher.weight.cpu()}
    if teacher.bias is not None:
        tensors["bias"] = teacher.bias.cpu()
    return StoredFile(name=HEAD, bytes=write_tensors(folder / HEAD, tensors))


def _run(
    teacher: TeacherOutputs,
    wanted: Sequence[_Wanted],
    missing: Sequence[range],
    recipe: Recipe,
    shards: ShardWriter,
    report: Report,
) -> None:
    """Compute and write the missing rows."""
    done, tokens = len(wanted) - sum(map(len, missing)), 0
    for gap in missing:
        sent: deque[tuple[int, Batch]] = deque()  # the teacher may be several batches ahead
        batches = _batches(wanted, gap, recipe.batch_size, teacher.device, sent)
        for source in teacher.sources(batches):
            first, batch = sent.popleft()
            rows = [_stored(source, row, recipe) for row in rows_of(**batch)]
            shards.add(first, rows)
            done += len(rows)
            tokens += sum(row.supervised for row in wanted[first : first + len(rows)])
            report(done, len(wanted), tokens)
        shards.flush()  # a shard contains consecutive rows
    assert done == len(wanted), "the teacher yields the outputs of every batch"


def _batches(
    wanted: Sequence[_Wanted],
    gap: range,
    size: int,
    device: torch.device,
    sent: deque[tuple[int, Batch]],
) -> Iterator[Batch]:
    """The batches of a range of rows; each is also appended to ``sent``, with its first row."""
    collate = Collator()
    for first in range(gap.start, gap.stop, size):
        rows = collate([row.example for row in wanted[first : first + size]])
        batch = {
            name: rows[name].to(device) for name in ("input_ids", "attention_mask", "shift_labels")
        }
        sent.append((first, batch))
        yield batch


def _stored(source: Outputs, row: BatchRow, recipe: Recipe) -> StoredRow:
    """What is stored of a teacher's outputs for one row of a batch."""
    at_row = [tensor[row.number] for tensor in _of_positions(source)]
    positions = row.positions.to(at_row[0].device)
    values = [tensor.index_select(0, positions) for tensor in at_row]
    mass = None
    if recipe.kind == "hidden":
        tensors = {"hidden": values[0]}
    elif recipe.kind == "top_k":
        log_probs, indices, tail = _top_k(source, values, recipe)
        mass = float(log_probs.double().exp().sum())
        distances, tail = round_top_k(log_probs, tail)
        tensors = {"log_probs": distances, "indices": indices.int(), "tail": tail}
    else:
        log_probs, indices = _draws(source, values, row.key, recipe)
        tensors = {"log_probs": log_probs.float(), "indices": indices.int()}
    return StoredRow(row.key, {name: tensor.cpu() for name, tensor in tensors.items()}, mass)


def _of_positions(source: Outputs) -> tuple[Tensor, ...]:
    """The tensors of a source that have an entry for each position, unlike its head."""
    return source.tensors if isinstance(source, TopK) else source.tensors[:1]


def _top_k(source: Outputs, values: Sequence[Tensor], recipe: Recipe) -> tuple[Tensor, ...]:
    """Log-probabilities, indices and tail of the k most likely tokens at the positions of a row."""
    if not isinstance(source, TopK):
        return _joined(
            TopK.from_logits(logits, recipe.entries, recipe.temperature).tensors
            for logits in _logits(source, values[0], recipe.vocab_size)
        )
    found = (source.log_probs.shape[-1], source.temperature, source.vocab_size)
    wanted = (recipe.entries, recipe.temperature, recipe.vocab_size)
    if found != wanted:
        raise InputError(
            "the teacher returned {} tokens per position, at temperature {:g}, of a vocabulary of "
            "{}; the cache stores {}, at {:g}, of {}".format(*found, *wanted)
        )
    return tuple(values)


def _draws(
    source: Outputs, values: Sequence[Tensor], key: bytes, recipe: Recipe
) -> tuple[Tensor, ...]:
    """Log-probabilities and indices of tokens drawn at the positions of a row.

    The generator is seeded for each row from the seed and the row's key, so that its draws depend
    neither on other rows nor on interruptions.
    """
    import torch

    if isinstance(source, TopK):
        raise InputError(
            "tokens cannot be drawn from a teacher that returns only its most likely ones; use "
            "--kind top-k"
        )
    seed = hashlib.sha256(str(recipe.seed).encode() + key).digest()[:8]
    generator = torch.Generator(values[0].device).manual_seed(int.from_bytes(seed, "little"))
    return _joined(
        Sampled.from_logits(logits, recipe.entries, recipe.temperature, generator).tensors
        for logits in _logits(source, values[0], recipe.vocab_size)
    )


def _logits(source: Logits | Projected, values: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """The logits at some positions, cut to the vocabulary, a limited number at a time."""
    import torch

    for piece in torch.split(values, max(1, _LOGITS_AT_ONCE // source.vocab_size)):
        if isinstance(source, Projected):
            raw = torch.nn.functional.linear(piece, source.weight, source.bias)
            yield source.post(raw)[:, :vocab_size]
        else:
            yield piece[:, :vocab_size]


def _joined(pieces: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    import torch

    return tuple(torch.cat(column) for column in zip(*pieces, strict=True))
