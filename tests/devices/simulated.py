"""A device in Python: its tensors lie in CPU memory, but mixing them with CPU tensors fails.

``pytest --device simulated`` shows without an accelerator that library and tests create their
tensors on the device they were given, and copy them back before numpy reads them. Streams, kernels
and the compiler of a real device are not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import library
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

_aten = torch.ops.aten
_ACROSS_DEVICES = {_aten._to_copy.default, _aten.copy_.default}
# Made on the CPU and moved: they read Python's numbers, or set the size of their output late.
_MOVED = {
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.arange,
    torch.randperm,
    torch.linspace,
}


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device around one on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimulatedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("simulated", 0),
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Simulated({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the CPU tensors inside its arguments."""

    def inner(value: Any) -> Any:
        if isinstance(value, SimulatedTensor):
            return value.inner
        if isinstance(value, torch.Tensor) and value.ndim and func not in _ACROSS_DEVICES:
            raise RuntimeError(f"{func}: one tensor is on the simulated device, another on the CPU")
        return value

    given, named = tree_map(inner, (args, kwargs))
    to_cpu = False
    if named.get("device") is not None:
        to_cpu = torch.device(named["device"]).type == "cpu"
        named["device"] = torch.device("cpu")
    result = func(*given, **named)
    if func is _aten.copy_.default:
        return args[0]
    if to_cpu:
        return result
    outputs = tree_map(lambda x: SimulatedTensor(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(func, args, kwargs, outputs)


def _index(part: Any) -> Any:
    """An index as torch makes it from a list."""
    is_list = isinstance(part, list)
    return torch.tensor(part, device="cpu").to("simulated") if is_list else part


class _Constructors(TorchFunctionMode):
    """What a tensor subclass cannot do itself: be made of Python's numbers and become them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist:
            return args[0].detach().cpu().tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            tensor, index, *value = args
            index = tuple(map(_index, index)) if isinstance(index, tuple) else _index(index)
            return func(tensor, index, *value)
        if func is torch.Tensor.new_tensor:
            kwargs.setdefault("device", args[0].device)
            func, args = torch.tensor, args[1:]
        if func not in _MOVED:
            return func(*args, **kwargs)
        device = kwargs.pop("device", None) or "simulated"
        needs_gradient = kwargs.pop("requires_grad", False)
        given = isinstance(args[0], torch.Tensor)
        made = args[0] if given else func(*args, device="cpu", **kwargs)
        moved = made.to(device=device, dtype=kwargs.get("dtype"))
        return moved.requires_grad_() if needs_gradient else moved


_setup_privateuseone_for_python_backend("simulated", _Module())
_fallbacks = library.Library("_", "IMPL")
_fallbacks.fallback(_run, "PrivateUse1")


@contextmanager
def simulated_device() -> Iterator[None]:
    """Create tensors on the simulated device, which has no compiler."""
    without_compiler = mock.patch.object(torch, "compile", lambda function, **_: function)
    with torch.device("simulated"), _Constructors(), without_compiler:
        yield
