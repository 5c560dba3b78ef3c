"""What a loss needs, measured: it is evaluated on a few rows of the real width.

Every tensor of the loss grows with rows times vocabulary, whatever the loss is; hidden states and
head, whose products would take long, are narrow here, and their gradients are counted apart.
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
# Tensors of a chunk's size that a compiled tile of a whole chunk holds at once, by the allocator's
# records on a CPU: forward_kl 4, generalized_jsd 5, adaptive_kl 11.
_COPIES, _COPIES_OF_ROW_LOSSES = 5, 11


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made under it took at once.

    Autograd adds gradients up in place, but not under a mode like this one; the sum that it makes
    here outlives the summand at once, and is not looked at before.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and looks at what it returns."""
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
    config: LossConfig, vocab_size: int, student: ModelSize, tokens: int, device: str
) -> int:
    """The most bytes that the loss of a micro-batch takes, gradients of its inputs included.

    Args:
        config: the loss, its chunk size and compilation settled where it is chunked.
        vocab_size: that both heads are cut to.
        student: widths and type.
        tokens: supervised ones of the micro-batch.
        device: ``cpu`` or ``cuda``.
    """
    width = student.head[1]
    inputs = tokens * width * student.item_size
    if not parse_spec(config.spec).chunked:
        return inputs + tokens * _measured(config, vocab_size, _FEW_ROWS) // _FEW_ROWS
    assert config.chunk_size is not None
    chunk = min(config.chunk_size, tokens)
    head = student.head[0] * width * _FLOAT if student.trained_head else 0
    return inputs + head + _chunk_bytes(config, vocab_size, chunk, device)


def _chunk_bytes(config: LossConfig, vocab_size: int, chunk: int, device: str) -> int:
    if device == "cpu":
        # A chunk is worked through in small tiles, so that it is tried as a whole. Compiled tiles
        # take less; the difference is small beside the chunk.
        return _measured(config, vocab_size, chunk)
    if config.compiled:
        terms = build_loss(config, vocab_size).terms
        whole_rows = any(isinstance(term.loss, RowLoss) for term in terms)
        copies = _COPIES_OF_ROW_LOSSES if whole_rows else _COPIES
        return copies * chunk * vocab_size * _FLOAT
    few = min(chunk, _FEW_ROWS)
    return chunk * _measured(config, vocab_size, few) // few


def _measured(config: LossConfig, vocab_size: int, rows: int) -> int:
    """Peak memory of loss and gradient of so many rows, between narrow models."""
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
