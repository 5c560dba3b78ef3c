"""The number of rows of a chunk, and whether its row functions are compiled.

Both depend only on the configuration, not on timings or free memory, so that a repeated or resumed
run has the same rounding.
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
    """The chunking options; None leaves the choice to this module.

    Attributes:
        size: rows per chunk.
        compiled: compile the row functions (True) or run them eagerly (False).
    """

    size: int | None = None
    compiled: bool | None = None


def automatic_chunk_size(vocab_size: int, head_width: int, device: torch.device) -> int:
    """Rows per chunk: a power of two that keeps a chunk's float32 logits within a budget.

    The budget grows with the head, because each chunk accumulates the gradient of the whole head,
    which dominates the time of small chunks with a wide head (measured in docs/benchmarks/).

    Args:
        vocab_size: width of the logits.
        head_width: width of the hidden states; 0 if logits are given instead.
        device: device of the product.
    """
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ACCELERATOR)
    budget = max(budget, vocab_size * head_width)  # a quarter of the head's float32 gradient
    return _power_of_two(max(_LOWEST, min(_HIGHEST, budget // (4 * vocab_size))))


def tile_rows(vocab_size: int, device: torch.device) -> int | None:
    """Rows that the row functions process at once; None for all rows of a chunk.

    On a CPU, the intermediate results of a tile stay in the cache instead of needing several more
    tensors of chunk size (measured in docs/decisions/); accelerators need few large launches.
    """
    budget = _TILE_BYTES.get(device.type)
    if budget is None:
        return None
    # A power of two divides chunks evenly, and distributes rows evenly among threads.
    return _power_of_two(max(_FEWEST_TILE_ROWS, budget // (4 * vocab_size)))


@functools.cache
def keep_freed_tiles() -> None:
    """Make the C library keep freed tile memory for reuse, once per process.

    Depending on the heap layout, glibc may return freed blocks of a tile's size to the system; each
    tile then page-faults all its memory again, which doubles its time. glibc's threshold is twice
    the size of the largest block of up to 32 MiB that was ever freed, so one such block is
    allocated and freed without writing to it. Other allocators are not affected.
    """
    # A storage instead of a tensor, so that memory counters do not attribute it to a loss.
    torch.UntypedStorage(_LARGEST_THAT_GLIBC_LEARNS_FROM)  # type: ignore[no-untyped-call]


def spans(start: int, stop: int, largest: int) -> Iterator[slice]:
    """Consecutive slices of nearly equal length, none longer than ``largest``."""
    total = stop - start
    parts = -(-total // largest)
    for part in range(parts):
        yield slice(start + total * part // parts, start + total * (part + 1) // parts)


def compiles(vocab_size: int) -> bool:
    """Whether the default is to compile, for a vocabulary of this size."""
    return vocab_size >= _COMPILE_FROM_VOCABULARY


def _power_of_two(rows: int) -> int:
    """The largest power of two that is at most ``rows``."""
    return 1 << (rows.bit_length() - 1)
