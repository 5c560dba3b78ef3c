"""Continue an interrupted build: compare its plan with the new one, and find its whole shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from kdrun.cache.manifest import PLAN, Kind, Plan, StoredFile, shard_files
from kdrun.cache.write import KEYS, MASS, STOPS, TENSORS, Shard
from kdrun.errors import InputError

# What differs between two plans, in the order in which it is looked for, and how it is called.
_CALLED = {
    "format": "format",
    "kind": "--kind",
    "entries": "number of entries per token (--k, --draws)",
    "temperature": "--temperature",
    "seed": "seed of the draws (training.seed)",
    "max_length": "--max-length",
    "batch_size": "--batch-size",
    "dtype": "--dtype",
    "date": "date in the rows (data.date)",
    "vocab_size": "number of shared tokens",
    "tokenizer": "tokenizer or chat template",
    "teacher": "teacher",
    "logit_scale": "scale of the teacher's logits",
    "softcap": "soft cap of the teacher's logits",
    "rows": "number of rows",
    "tokens": "number of supervised tokens",
    "keys": "content or order of the rows",
}


def hash_keys(keys: Iterable[bytes]) -> str:
    """The hash of the keys of all rows, in order."""
    return hashlib.sha256(b"".join(keys)).hexdigest()


def read_plan(folder: Path) -> Plan | None:
    """The plan of an interrupted build; None if no build began in the folder.

    Raises:
        InputError: the plan is damaged, or missing beside shards.
    """
    path = folder / PLAN
    if not path.is_file():
        if shard_files(folder):
            raise InputError(
                f"{folder} contains rows of a cache, but no {PLAN} that says what they are; choose "
                f"another folder, or remove {folder}"
            )
        return None
    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is unreadable, so the build in its folder cannot be continued; choose another "
            f"folder, or remove {folder}"
        ) from error


def check_plan(folder: Path, found: Plan, wanted: Plan) -> None:
    """Refuse to continue a build with another plan.

    Args:
        folder: folder of the build.
        found: the plan of the interrupted build.
        wanted: the plan of this one. The name of the teacher may differ.

    Raises:
        InputError: names the first difference and what can be done; nothing was removed.
    """
    for name, called in _CALLED.items():
        before, now = getattr(found, name), getattr(wanted, name)
        if before != now:
            values = f" ({_shown(before)}, now {_shown(now)})" if _is_short(before, now) else ""
            raise InputError(
                f"{folder} contains the unfinished build of another cache: the {called} differs"
                f"{values}; continue with what that build was started with, choose another folder, "
                f"or remove {folder} to start over"
            )


def _shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"


def _is_short(*values: object) -> bool:
    """Whether values mean something to the reader; hashes do not."""
    return all(value is None or len(str(value)) < 20 for value in values)


def find_shards(
    folder: Path,
    kind: Kind,
    keys: Sequence[bytes],
    supervised: Sequence[int],
    batch_size: int,
    say: Callable[[str], None],
) -> list[Shard]:
    """Find the whole shards of an interrupted build, and remove damaged ones.

    Args:
        folder: folder of the build.
        kind: kind of the cache.
        keys: keys of all rows, in order.
        supervised: number of supervised positions of each row.
        batch_size: rows per batch; a shard begins and ends with a batch.
        say: called with a line for each shard that is removed.

    Returns:
        The shards in the order of their rows, which do not overlap.

    Raises:
        InputError: a shard cannot be read at the moment.
        OSError: likewise.
    """
    numbers = {key: number for number, key in enumerate(keys)}
    paths = shard_files(folder)
    read = (_read_shard(path, kind, numbers, supervised) for path in paths)
    found: list[Shard] = []
    for shard in sorted((shard for shard in read if shard), key=lambda shard: shard.first):
        ends_batch = shard.stop % batch_size == 0 or shard.stop == len(keys)
        behind_last = shard.first >= (found[-1].stop if found else 0)
        if shard.first % batch_size == 0 and ends_batch and behind_last:
            found.append(shard)
    kept = {shard.file.name for shard in found}
    for path in paths:
        if path.name not in kept:
            say(f"{path} is damaged; its rows are computed again")
            path.unlink()
    return found


def gaps(shards: Sequence[Shard], rows: int) -> list[range]:
    """The rows that no shard contains, as ranges in order.

    Args:
        shards: shards in the order of their rows.
        rows: number of all rows.
    """
    stops = [0, *(shard.stop for shard in shards)]
    starts = [*(shard.first for shard in shards), rows]
    return [range(a, b) for a, b in zip(stops, starts, strict=True) if a < b]


def _read_shard(
    path: Path, kind: Kind, numbers: Mapping[bytes, int], supervised: Sequence[int]
) -> Shard | None:
    """A shard, if it is whole and contains consecutive rows with all their tensors.

    Errors of the file system do not count as damage, because the file may be whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            found = [key.tobytes() for key in opened.get_tensor(KEYS).numpy()]
            stops = [0, *opened.get_tensor(STOPS).tolist()]
            lengths = {opened.get_slice(name).get_shape()[0] for name in TENSORS[kind]}
            masses = opened.get_tensor(MASS).tolist() if kind == "top_k" else []
    except SafetensorError:
        return None
    except RuntimeError as error:  # torch's, which opens the file once more
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be read ({reason}); give the command again") from error
    first = numbers.get(found[0]) if found else None
    if first is None:
        return None
    rows = range(first, first + len(found))
    in_order = [numbers.get(key) for key in found] == list(rows)
    whole = [b - a for a, b in pairwise(stops)] == list(supervised[first : rows.stop])
    if not in_order or not whole or lengths != {stops[-1]}:
        return None
    if kind == "top_k" and len(masses) != len(found):
        return None
    file = StoredFile(name=path.name, bytes=path.stat().st_size, rows=len(found))
    return Shard(file, first, tuple(masses))
