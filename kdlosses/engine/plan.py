"""How many rows a chunk has, and whether its row functions are compiled.

Both follow from the configuration alone, never from a timer or from how much memory happens to be
free, so that a repeated or resumed run rounds in the same way.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

_COMPILE_FROM_VOCABULARY = 1024
_LOWEST, _HIGHEST = 64, 4096
_CHUNK_BYTES = {"cpu": 96 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 256 * 2**20
_TILE_BYTES = {"cpu": 4 * 2**20}
_FEWEST_TILE_ROWS = 8
_LARGEST_THAT_GLIBC_LEARNS_FROM = 31 * 2**20


@dataclass(frozen=True)
class Chunking:
    """The user's wishes; None leaves the choice to this module.

    Attributes:
        size: rows a chunk.
        compiled: compile the row functions (True), run them eagerly (False).
    """

    size: int | None = None
    compiled: bool | None = None


def automatic_chunk_size(vocab_size: int, head_width: int, device: torch.device) -> int:
    """Rows a chunk: a power of two that keeps a chunk's float32 logits within a budget.

    The budget grows with the head, because each chunk adds to the head's whole gradient once:
    with a wide head, small chunks spend their time there (measured in docs/benchmarks/).

    Args:
        vocab_size: width of the logits.
        head_width: width of the hidden states; 0 where logits are given and there is no head.
        device: where the product runs.
    """
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ACCELERATOR)
    budget = max(budget, vocab_size * head_width)  # a quarter of the head's float32 gradient
    return _power_of_two(max(_LOWEST, min(_HIGHEST, budget // (4 * vocab_size))))


def tile_rows(vocab_size: int, device: torch.device) -> int | None:
    """Rows that the row functions see at once; None for all rows of a chunk.

    On a CPU a block's intermediate results then stay in the cache instead of taking several more
    tensors of chunk size (measured in docs/decisions/); an accelerator wants few large launches.
    """
    budget = _TILE_BYTES.get(device.type)
    if budget is None:
        return None
    # A power of two divides a chunk evenly, and its rows evenly among threads.
    return _power_of_two(max(_FEWEST_TILE_ROWS, budget // (4 * vocab_size)))


@functools.cache
def keep_freed_tiles() -> None:
    """Have the C library keep what a tile frees for the next tile, once a process.

    glibc hands blocks of a tile's size back to the system when they are freed, or not, as the heap
    happens to lie; each tile then faults all its pages in anew, which doubles its time. What it
    keeps follows from the largest block of up to 32 MiB that was ever freed: twice its size. So one
    is, that nothing was written to. Other allocators take no notice.
    """
    # A storage and no tensor, which what counts tensors would take for a loss's memory.
    torch.UntypedStorage(_LARGEST_THAT_GLIBC_LEARNS_FROM)  # type: ignore[no-untyped-call]


def spans(start: int, stop: int, largest: int) -> Iterator[slice]:
    """Consecutive slices of nearly equal length, none longer than ``largest``."""
    total = stop - start
    parts = -(-total // largest)
    for part in range(parts):
        yield slice(start + total * part // parts, start + total * (part + 1) // parts)


def compiles(vocab_size: int) -> bool:
    """Whether compiling pays for a vocabulary of this size by default."""
    return vocab_size >= _COMPILE_FROM_VOCABULARY


def _power_of_two(rows: int) -> int:
    """The largest one that is not above."""
    return 1 << (rows.bit_length() - 1)
