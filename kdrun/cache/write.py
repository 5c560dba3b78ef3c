"""Write a cache: shards of rows, each written atomically, and finally the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.cache.manifest import MANIFEST, Manifest, StoredFile, is_unfinished, shard_name
from kdrun.errors import InputError, TrainingError
from kdrun.files import LOCK, write_bytes, write_text
from kdrun.paths import make_output_folder

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 256 * 2**20
KEYS, STOPS = "keys", "stops"
"""Names in a shard: the keys of its rows ``[rows, 32]`` and the end of each row ``[rows]``."""


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
    """Create the folder of a new cache, and remove the files of an interrupted build.

    Raises:
        InputError: the folder contains a cache or other files, or cannot be written.
    """
    make_folder(folder)
    try:
        if is_unfinished(folder):
            for entry in _entries(folder):
                entry.unlink()
    except OSError as error:
        raise InputError(
            f"--output {folder}: {error.strerror}; choose a writable folder"
        ) from error
    if _entries(folder):
        raise InputError(f"--output {folder} is not empty; choose another folder")


def _entries(folder: Path) -> list[Path]:
    """The content of a folder, except the lock of the building process."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(LOCK)]


class ShardWriter:
    """Collect rows and write them in shards.

    Args:
        folder: folder of the cache.
        shard_bytes: approximate size of a shard.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._rows: list[tuple[bytes, Mapping[str, Tensor]]] = []
        self._collected = 0
        self.shards: list[StoredFile] = []

    def add(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Add a row, as tensors whose first axis is its supervised positions."""
        self._rows.append((key, {name: tensor.cpu() for name, tensor in tensors.items()}))
        self._collected += sum(tensor.nbytes for tensor in tensors.values())
        if self._collected >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows."""
        import torch

        if not self._rows:
            return
        keys = [list(key) for key, _ in self._rows]
        names = list(self._rows[0][1])
        lengths = torch.tensor([len(row[names[0]]) for _, row in self._rows])
        content = {name: torch.cat([row[name] for _, row in self._rows]) for name in names}
        content[KEYS] = torch.tensor(keys, dtype=torch.uint8)
        content[STOPS] = lengths.cumsum(0)
        name = shard_name(len(self.shards) + 1)
        size = write_tensors(self._folder / name, content)
        self.shards.append(StoredFile(name=name, bytes=size, rows=len(keys)))
        self._rows, self._collected = [], 0


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a safetensors file atomically.

    Returns:
        The size of the file.

    Raises:
        TrainingError: the disk is full or fails.
    """
    from safetensors.torch import save

    try:
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_bytes(path, data)
    except OSError as error:
        raise _failure(path, error) from error
    return len(data)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which marks the cache as complete.

    Raises:
        TrainingError: the disk is full or fails.
    """
    try:
        write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    except OSError as error:
        raise _failure(folder / MANIFEST, error) from error


def stored_bytes(rows: Sequence[int], bytes_per_token: int, head_bytes: int) -> int:
    """The approximate size of a cache.

    Args:
        rows: number of supervised positions of each row.
        bytes_per_token: stored bytes per position.
        head_bytes: size of the output head.
    """
    return sum(rows) * bytes_per_token + len(rows) * (32 + 8) + head_bytes


def _failure(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path} could not be written ({error.strerror}); the cache is incomplete: free some space "
        "and build it again in the same folder"
    )
