"""Write a cache: its plan, shards of rows, each written atomically, and finally the manifest."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kdrun.cache.manifest import (
    MANIFEST,
    PLAN,
    Kind,
    Manifest,
    Plan,
    StoredFile,
    is_unfinished,
    shard_name,
)
from kdrun.errors import InputError, TrainingError
from kdrun.files import LOCK, write_bytes, write_text
from kdrun.paths import make_output_folder

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 256 * 2**20
SHARD_SECONDS = 180.0
"""A shard is written at this age even if it is small, so that little is lost when a build ends."""
KEYS, STOPS, MASS = "keys", "stops", "mass"
"""Names in a shard: the keys of its rows ``[rows, 32]``, the end of each row ``[rows]``, and, for
top-k, the sum over each row of the mass of its k tokens ``[rows]``."""

TENSORS: Mapping[Kind, tuple[str, ...]] = {
    "hidden": ("hidden",),
    "top_k": ("log_probs", "indices", "tail"),
    "sampled": ("log_probs", "indices"),
}
"""Names of the other tensors in a shard; their first axis is the supervised positions in it."""


class DiskError(TrainingError):
    """A file of a cache could not be written: exit code 1."""


@dataclass(frozen=True, eq=False)
class StoredRow:
    """A row to be written.

    Attributes:
        key: key of the row.
        tensors: tensors whose first axis is the supervised positions of the row.
        mass: sum over the positions of the mass of the stored tokens (``top_k``).
    """

    key: bytes
    tensors: Mapping[str, Tensor]
    mass: float | None = None


@dataclass(frozen=True)
class Shard:
    """A complete shard.

    Attributes:
        file: its file.
        first: number of its first row in the order of the build.
        masses: mass of each row (``top_k``).
    """

    file: StoredFile
    first: int
    masses: tuple[float, ...] = ()

    @property
    def stop(self) -> int:
        """Number of the row behind its last."""
        return self.first + self.file.rows


def make_folder(folder: Path) -> None:
    """Create the folder of a new cache without changing its content.

    Raises:
        InputError: the folder contains a cache, is a file, or cannot be written.
    """
    if (folder / MANIFEST).is_file():
        raise InputError(
            f"--output {folder} already contains a cache; remove it, or choose another folder"
        )
    make_output_folder(folder)


def prepare_folder(folder: Path) -> None:
    """Create the folder of a cache, or remove the half-written files of an interrupted build.

    Raises:
        InputError: the folder contains a cache or other files, or cannot be written.
    """
    make_folder(folder)
    if _entries(folder) and not is_unfinished(folder):
        raise InputError(f"--output {folder} is not empty; choose another folder")
    try:
        for entry in _entries(folder):
            if entry.name.endswith(".partial"):
                entry.unlink()
    except OSError as error:
        raise InputError(
            f"--output {folder}: {error.strerror}; choose a writable folder"
        ) from error


def _entries(folder: Path) -> list[Path]:
    """The content of a folder, except the lock of the building process."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(LOCK)]


class ShardWriter:
    """Collect batches of rows and write them in shards, each of whole batches.

    Leaving the context writes what was collected, whatever the reason for leaving.

    Args:
        folder: folder of the cache.
        taken: names of the shards that are there already.
        shard_bytes: approximate size of a shard.
        shard_seconds: age at which a smaller shard is written.
    """

    def __init__(
        self,
        folder: Path,
        taken: Collection[str] = (),
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ) -> None:
        self._folder = folder
        self._taken = set(taken)
        self._shard_bytes = shard_bytes
        self._shard_seconds = shard_seconds
        self._first = 0
        self._rows: list[StoredRow] = []
        self._collected = 0
        self._began = time.monotonic()
        self.shards: list[Shard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, DiskError):  # the disk would fail again
            self.flush()

    def add(self, first: int, rows: Sequence[StoredRow]) -> None:
        """Add a batch.

        Args:
            first: number of its first row; follows the last row since the last :meth:`flush`.
            rows: its rows, on the CPU.

        Raises:
            DiskError: the disk is full or fails.
        """
        if not self._rows:
            self._first = first
        self._rows.extend(rows)
        self._collected += sum(tensor.nbytes for row in rows for tensor in row.tensors.values())
        age = time.monotonic() - self._began
        if self._collected >= self._shard_bytes or age >= self._shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows.

        Raises:
            DiskError: the disk is full or fails.
        """
        self._began = time.monotonic()
        if not self._rows:
            return
        name = self._free_name()
        size = write_tensors(self._folder / name, _shard_tensors(self._rows))
        file = StoredFile(name=name, bytes=size, rows=len(self._rows))
        masses = tuple(row.mass for row in self._rows if row.mass is not None)
        self.shards.append(Shard(file, self._first, masses))
        self._taken.add(name)
        self._rows, self._collected = [], 0

    def _free_name(self) -> str:
        number = len(self.shards) + 1
        while shard_name(number) in self._taken:
            number += 1
        return shard_name(number)


def _shard_tensors(rows: Sequence[StoredRow]) -> dict[str, Tensor]:
    import torch

    names = list(rows[0].tensors)
    content = {name: torch.cat([row.tensors[name] for row in rows]) for name in names}
    lengths = torch.tensor([len(row.tensors[names[0]]) for row in rows])
    content[KEYS] = torch.tensor([list(row.key) for row in rows], dtype=torch.uint8)
    content[STOPS] = lengths.cumsum(0)
    if rows[0].mass is not None:
        content[MASS] = torch.tensor([row.mass for row in rows], dtype=torch.float64)
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file atomically.

    Returns:
        The size of the file.

    Raises:
        DiskError: the disk is full or fails.
    """
    from safetensors.torch import save

    try:
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_bytes(path, data)
    except OSError as error:
        raise _failure(path, error) from error
    return len(data)


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan, before the first shard.

    Raises:
        DiskError: the disk is full or fails.
    """
    _write_json(folder / PLAN, plan)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which marks the cache as complete.

    Raises:
        DiskError: the disk is full or fails.
    """
    _write_json(folder / MANIFEST, manifest)


def _write_json(path: Path, content: Plan | Manifest) -> None:
    try:
        write_text(path, content.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise _failure(path, error) from error


def stored_bytes(rows: Sequence[int], bytes_per_token: int, head_bytes: int) -> int:
    """The approximate size of a cache.

    Args:
        rows: number of supervised positions of each row.
        bytes_per_token: stored bytes per position.
        head_bytes: size of the output head.
    """
    return sum(rows) * bytes_per_token + len(rows) * (32 + 8 + 8) + head_bytes


def _failure(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"{path} could not be written ({error.strerror}); the rows written before are kept: free "
        "some space and give the same command again to go on"
    )
