"""Build a cache by running each distinct row through the teacher once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlosses import Logits, Projected, Sampled, TopK
from kdrun.cache.fingerprint import print_teacher, print_tokenizer
from kdrun.cache.manifest import HEAD, DType, Kind, Manifest, StoredFile
from kdrun.cache.write import (
    SHARD_BYTES,
    ShardWriter,
    prepare_folder,
    stored_bytes,
    write_manifest,
    write_tensors,
)
from kdrun.data.batch_rows import rows_of
from kdrun.data.collate import Collator
from kdrun.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdrun.models.heads import FrozenTeacher

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
    """A row to be cached: the example, its length and its supervised positions."""

    example: Mapping[str, Sequence[int]]
    length: int
    supervised: int


Report = Callable[[int, int, int], None]


def build_cache(
    folder: Path,
    teacher: FrozenTeacher,
    teacher_name: str,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Mapping[str, Sequence[int]]],
    recipe: Recipe,
    report: Report = lambda rows, total, tokens: None,
    shard_bytes: int = SHARD_BYTES,
    spare_bytes: int = 0,
) -> Manifest:
    """Run rows through a teacher and store what losses need of its output.

    Args:
        folder: a new or empty folder, or the folder of an interrupted build.
        teacher: the teacher, on its device.
        teacher_name: name of the teacher, as given by the user.
        tokenizer: the tokenizer that encoded the rows.
        examples: rows with ``input_ids`` and ``labels`` (not shifted); duplicates are stored once.
        recipe: what to store.
        report: called after each batch with the finished rows, the total number of rows and the
            finished supervised tokens.
        shard_bytes: approximate size of a file.
        spare_bytes: space that must remain free on the disk.

    Returns:
        The manifest, which is written last.

    Raises:
        SpaceError: too little space.
        InputError: an invalid folder or recipe.
        TrainingError: the disk fails.
    """
    if recipe.kind == "hidden" and teacher.split.reason is not None:
        raise InputError(
            f"{teacher_name}: its hidden states cannot be cached, because {teacher.split.reason}; "
            "use --kind top-k or --kind sampled"
        )
    if recipe.kind == "top_k" and recipe.entries > recipe.vocab_size:
        raise InputError(f"--k {recipe.entries}: the vocabulary has {recipe.vocab_size} tokens")
    prepare_folder(folder)
    wanted = sorted(_different(examples), key=lambda row: -row.length)
    if not wanted:
        raise InputError("no row has a supervised token, so there is nothing to cache")
    head = teacher.model.get_output_embeddings()
    width = int(head.weight.shape[1])
    _check_space(folder, wanted, recipe, width, head.weight, spare_bytes)
    shards = ShardWriter(folder, shard_bytes)
    head_file = None if recipe.kind != "hidden" else _write_head(folder, head)
    kept_mass = _run(teacher, wanted, recipe, shards, report)
    manifest = Manifest(
        kind=recipe.kind,
        teacher_name=teacher_name,
        teacher=print_teacher(teacher.model),
        tokenizer=print_tokenizer(tokenizer),
        dtype=dtype_name(head.weight.dtype),
        logit_scale=teacher.split.logit_scale,
        softcap=teacher.split.softcap,
        vocab_size=recipe.vocab_size,
        entries=width if recipe.kind == "hidden" else recipe.entries,
        temperature=None if recipe.kind == "hidden" else recipe.temperature,
        kept_mass=kept_mass,
        seed=recipe.seed if recipe.kind == "sampled" else None,
        max_length=recipe.max_length,
        date=recipe.date,
        rows=len(wanted),
        tokens=sum(row.supervised for row in wanted),
        head=head_file,
        shards=tuple(shards.shards),
    )
    write_manifest(folder, manifest)
    return manifest


def dtype_name(dtype: torch.dtype) -> DType:
    """The name of a data type in the configuration."""
    import torch

    names: dict[torch.dtype, DType] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[dtype]


def _different(examples: Iterable[Mapping[str, Sequence[int]]]) -> list[_Wanted]:
    """The distinct rows with supervised tokens."""
    found: dict[bytes, _Wanted] = {}
    alone = Collator()
    for example in examples:
        batch = alone([example])
        for row in rows_of(batch["input_ids"], batch["attention_mask"], batch["shift_labels"]):
            found.setdefault(row.key, _Wanted(example, len(row.ids), len(row.positions)))
    return list(found.values())


def _check_space(
    folder: Path,
    wanted: Sequence[_Wanted],
    recipe: Recipe,
    width: int,
    weight: Tensor,
    spare: int,
) -> None:
    hidden = recipe.kind == "hidden"
    per_token = width * weight.element_size() if hidden else recipe.entries * 8 + 4
    needed = stored_bytes(
        [row.supervised for row in wanted], per_token, weight.nbytes if hidden else 0
    )
    free = shutil.disk_usage(folder).free
    if needed + spare > free:
        raise SpaceError(folder, needed, free)


def _write_head(folder: Path, head: Any) -> StoredFile:
    tensors = {"weight": head.weight.detach().cpu()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu()
    return StoredFile(name=HEAD, bytes=write_tensors(folder / HEAD, tensors))


def _run(
    teacher: FrozenTeacher,
    wanted: Sequence[_Wanted],
    recipe: Recipe,
    shards: ShardWriter,
    report: Report,
) -> float | None:
    """Write the shards; returns the mean kept mass of top-k."""
    import torch

    device = teacher.model.device
    generator = torch.Generator(device).manual_seed(recipe.seed)
    collate = Collator()
    tokens, mass = 0, 0.0
    for first in range(0, len(wanted), recipe.batch_size):
        part = wanted[first : first + recipe.batch_size]
        batch = {k: v.to(device) for k, v in collate([row.example for row in part]).items()}
        features = {name: batch[name] for name in ("input_ids", "attention_mask", "shift_labels")}
        source = teacher.source(**features)
        for row in rows_of(**features):
            kept = _kept(source, row.number, row.positions.to(device), recipe, generator)
            shards.add(row.key, kept)
            tokens += len(row.positions)
            if recipe.kind == "top_k":
                mass += float(kept["log_probs"].double().exp().sum())
        report(first + len(part), len(wanted), tokens)
    shards.flush()
    return mass / tokens if recipe.kind == "top_k" else None


def _kept(
    source: Projected | Logits,
    number: int,
    positions: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The tensors to store for one row of a batch."""
    import torch

    values = source.tensors[0][number].index_select(0, positions)
    if recipe.kind == "hidden":
        return {"hidden": values}
    rows = max(1, _LOGITS_AT_ONCE // source.vocab_size)
    pieces = []
    for piece in torch.split(values, rows):
        logits = _logits(source, piece)[:, : recipe.vocab_size]
        found: TopK | Sampled
        if recipe.kind == "top_k":
            found = TopK.from_logits(logits, recipe.entries, recipe.temperature)
        else:
            found = Sampled.from_logits(logits, recipe.entries, recipe.temperature, generator)
        pieces.append(found.tensors)
    log_probs, indices, *tail = (torch.cat(column) for column in zip(*pieces, strict=True))
    kept = {"log_probs": log_probs.float(), "indices": indices.int()}
    return {**kept, "tail": tail[0].float()} if tail else kept


def _logits(source: Projected | Logits, values: Tensor) -> Tensor:
    import torch

    if isinstance(source, Logits):
        return values
    return source.post(torch.nn.functional.linear(values, source.weight, source.bias))
