"""The memory of a loss, measured on a few rows with the real vocabulary size.

The tensors of every loss grow with rows times vocabulary. Hidden states and head are narrow here,
because their products would take long, and their gradients are counted separately.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kdlosses import KDObjective, Projected, RowLoss, parse_spec
from kdrun.config.sections import KD_RATIO
from kdrun.losses.build import build_loss

if TYPE_CHECKING:
    from kdrun.config.sections import LossConfig
    from kdrun.dry_run.models import ModelSize

_WIDTH = 4
_FEW_ROWS = 8
_FLOAT = 4
# Number of chunk-sized tensors that a compiled tile of a whole chunk holds at once, as recorded by
# the allocator on a CPU: forward_kl 4, generalized_jsd 5, adaptive_kl 11.
_COPIES, _COPIES_OF_ROW_LOSSES = 5, 11


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the peak memory of tensors created in this context.

    Autograd accumulates gradients in place, but not under a dispatch mode. The sum allocated here
    replaces the summand immediately and is only counted afterwards.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator and count its outputs."""
        given = {_key(x) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and _key(value) not in given:
                self._add(value.untyped_storage())
        in_backward = torch._C._current_graph_task_id() != -1
        if not (in_backward and func is torch.ops.aten.add.Tensor):
            self.peak = max(self.peak, self._now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = int(storage._cdata)
        if key in self._alive:
            return
        size = storage.nbytes()

        def remove(_: Any) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, remove)
        self._now += size


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def loss_bytes(
    config: LossConfig,
    vocab_size: int,
    student: ModelSize,
    item_size: int,
    tokens: int,
    device: str,
) -> int:
    """The peak memory of the loss of a micro-batch in bytes, including gradients of its inputs.

    Args:
        config: section of the loss, with chunk size and compilation resolved if it is chunked.
        vocab_size: shared vocabulary size of both heads.
        student: student, for its widths.
        item_size: bytes of an element of the hidden states at its head.
        tokens: number of supervised tokens of the micro-batch.
        device: ``cpu`` or ``cuda``.
    """
    width = student.head[1]
    inputs = tokens * width * item_size
    if not parse_spec(config.spec).chunked:
        return inputs + tokens * _measured(config, vocab_size, _FEW_ROWS) // _FEW_ROWS
    assert config.chunk_size is not None
    chunk = min(config.chunk_size, tokens)
    head = student.head[0] * width * _FLOAT if student.trained_head else 0
    return inputs + head + _chunk_bytes(config, vocab_size, chunk, device)


def _chunk_bytes(config: LossConfig, vocab_size: int, chunk: int, device: str) -> int:
    if device == "cpu":
        # A chunk is processed in small tiles, so it is measured as a whole. Compiled tiles take
        # less, but the difference is small compared with the chunk.
        return _measured(config, vocab_size, chunk)
    if config.compiled:
        terms = build_loss(config, vocab_size).terms
        whole_rows = any(isinstance(term.loss, RowLoss) for term in terms)
        copies = _COPIES_OF_ROW_LOSSES if whole_rows else _COPIES
        return copies * chunk * vocab_size * _FLOAT
    few = min(chunk, _FEW_ROWS)
    return chunk * _measured(config, vocab_size, few) // few


def _measured(config: LossConfig, vocab_size: int, rows: int) -> int:
    """Peak memory of loss and gradient for a number of rows of narrow models."""
    chunked = parse_spec(config.spec).chunked
    eager = {"compiled": False, "chunk_size": rows} if chunked else {}
    loss = build_loss(config.model_copy(update=eager), vocab_size)
    objective = KDObjective(loss, config.schedules.get(KD_RATIO, config.kd_ratio))
    generator = torch.Generator().manual_seed(0)

    def states(count: int) -> torch.Tensor:
        return torch.randn(count, _WIDTH, generator=generator)

    student = Projected(states(rows).requires_grad_(), states(vocab_size))
    teacher = Projected(states(rows), states(vocab_size)) if objective.needs_teacher else None
    labels = torch.arange(rows) % vocab_size
    with PeakMemory() as measured:
        objective(student, teacher, labels).loss.backward()
    return int(measured.peak)
