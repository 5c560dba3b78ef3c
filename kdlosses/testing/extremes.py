"""Checks of impossible tokens, underflow, low precision and memory."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdlosses.divergence import Loss
from kdlosses.sources import Projected
from kdlosses.testing.cases import (
    close,
    finite,
    no_nan,
    pair,
    paths,
    projected,
    token_loss,
    value_and_gradient,
)
from kdlosses.testing.catalogue import conformance


@conformance()
def _impossible_tokens(loss: Loss) -> None:
    """Logits of -inf on one or both sides give no NaN in value or gradient."""
    for where in ("student", "teacher", "both"):
        teacher, student, labels = pair(6, 9, dtype=torch.float32)
        for side, logits in (("student", student), ("teacher", teacher)):
            if where in (side, "both"):
                logits[:, 2:5] = -math.inf
        labels %= 5  # some labels are impossible too
        for path, evaluate in paths(loss):
            value, gradient = value_and_gradient(evaluate, student, teacher, labels)
            no_nan(f"{path}: the value with -inf on {where}", value)
            finite(f"{path}: the gradient with -inf on {where}", gradient)


@conformance()
def _underflow(loss: Loss) -> None:
    """Distant logits at T = 0.05 give the float64 value and finite gradients."""
    teacher, student, labels = pair(8, 12, 10.0, torch.float32)
    for path, evaluate in paths(loss, temperature=0.05):
        exact = evaluate(student.double(), teacher.double(), labels, reduction="none")
        value = evaluate(student, teacher, labels, reduction="none")
        no_nan(f"{path}: the value", value)
        close(f"{path}: the value in float32", value.double(), exact, 1e-3, 1e-5)
        finite(f"{path}: the gradient", value_and_gradient(evaluate, student, teacher, labels)[1])


@conformance()
def _bfloat16(loss: Loss) -> None:
    """Logits in bfloat16 give the float64 value of the same numbers."""
    _compare_precision(loss, torch.bfloat16)


@conformance()
def _float16(loss: Loss) -> None:
    """Logits in float16 give the float64 value of the same numbers."""
    _compare_precision(loss, torch.float16)


def _compare_precision(loss: Loss, dtype: torch.dtype) -> None:
    teacher, student, labels = pair(6, 40, 1.5, dtype)
    precision = torch.finfo(dtype).eps
    for path, evaluate in paths(loss):
        expected, value = (
            evaluate(x, y, labels, reduction="none")
            for x, y in ((student.double(), teacher.double()), (student, teacher))
        )
        close(f"{path}: the value", value.double(), expected, 1e-4, 1e-5)
        _, exact = value_and_gradient(evaluate, student.double(), teacher.double(), labels)
        _, gradient = value_and_gradient(evaluate, student, teacher, labels)
        if gradient.dtype != dtype:
            raise AssertionError(f"{path}: the gradient is {gradient.dtype}")
        scale = exact.abs().max().item()
        close(f"{path}: the gradient", gradient.double(), exact, 2 * precision, precision * scale)


@conformance()
def _chunked_memory(loss: Loss) -> None:
    """In chunks, an additional row takes far less memory than its logits: nothing is [rows, V]."""
    width, few, many = 1024, 16, 64

    def peak(rows: int) -> int:
        hidden, weight, teacher, labels = projected(rows, width)
        source = Projected(hidden.requires_grad_(), weight.requires_grad_())
        target = Projected(teacher @ weight.detach(), weight.detach())
        evaluate = token_loss(loss, 8)
        with _LiveBytes() as live:
            evaluate(source, target, labels).backward()
        peak_bytes: int = live.peak
        return peak_bytes

    peak(few)  # exclude the setup of the first call
    per_row = (peak(many) - peak(few)) / (many - few)
    if not per_row < width / 2:
        raise AssertionError(
            f"each additional row takes {per_row:.0f} bytes at V={width}: a tensor of size "
            "[rows, V] is allocated or kept"
        )


class _LiveBytes(TorchDispatchMode):
    """Records the peak memory of tensors created in this context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self._now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)
