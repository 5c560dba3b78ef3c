"""Compiled versions of the row functions, one per static program, with a fallback to eager.

Each program has a function object of its own with isolated recompiles, so that many losses in
one process never meet torch.compile's recompile limit together.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

# A tensor with the rows first, a 0-d tensor, or some of them.
Argument = Tensor | tuple[Tensor, ...]

_tiles: dict[Hashable, Callable[..., Any]] = {}
_failures: set[str] = set()


def run(
    function: Callable[..., tuple[Tensor, ...]],
    static: tuple[Hashable, ...],
    arguments: tuple[Argument, ...],
    compiled: bool,
) -> tuple[Tensor, ...]:
    """Call ``function(*static, *arguments)``, compiled where asked and possible.

    Args:
        function: a pure function of tensors.
        static: leading arguments that are baked into the graph.
        arguments: tensors whose first axis is the rows (0-d tensors excepted), or tuples of them.
        compiled: False runs the function as it is.

    Returns:
        Tensors with the rows first.
    """
    if not compiled:
        return function(*static, *arguments)
    if any(tensor.ndim and len(tensor) == 1 for tensor in _tensors(arguments)):
        # Size 1 would specialise the graph: pad to 2, keep the first row.
        padded = tuple(
            _twice(item) if isinstance(item, Tensor) else tuple(_twice(x) for x in item)
            for item in arguments
        )
        return tuple(result[:1] for result in _call(function, static, padded))
    return _call(function, static, arguments)


def _call(
    function: Callable[..., tuple[Tensor, ...]],
    static: tuple[Hashable, ...],
    arguments: tuple[Argument, ...],
) -> tuple[Tensor, ...]:
    # Imported here: the compiler stack takes a second that a plain loss need not spend.
    from torch._dynamo import mark_dynamic
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    from kdlosses.engine.reuse import ReuseExponentials

    key = (function, static, *(_signature(tensor) for tensor in _tensors(arguments)))
    tile = _tiles.get(key)
    new = tile is None
    if tile is None:
        # Not dynamic but for the rows, marked below: tiles share a code object, and widths that
        # differ between programs would turn into symbols of the next one.
        tile = _tiles[key] = torch.compile(  # type: ignore[call-overload]
            functools.partial(function, *static),
            fullgraph=True,
            dynamic=False,
            isolate_recompiles=True,
            options={"post_grad_custom_post_pass": ReuseExponentials()},
        )
    for tensor in _tensors(arguments):
        if tensor.ndim:
            mark_dynamic(tensor, 0)
    try:
        with warnings.catch_warnings() if new else contextlib.nullcontext():
            if new:  # the compiler's own warnings are no business of the caller's filters
                warnings.simplefilter("ignore")
            return tile(*arguments)  # type: ignore[no-any-return]
    except (TorchDynamoException, InductorError) as error:
        # Raised before anything ran: the function is pure, so eager is a safe second try.
        _tiles[key] = functools.partial(function, *static)
        _warn_once(error)
        return function(*static, *arguments)


def _warn_once(error: Exception) -> None:
    reason = " ".join(str(error).split("\n\n", 1)[0].split())
    if reason not in _failures:
        _failures.add(reason)
        warnings.warn(
            f"torch.compile is not usable here, so the loss runs eagerly and slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _tensors(arguments: tuple[Argument, ...]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        else:
            yield from argument


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def _signature(tensor: Tensor) -> Hashable:
    return tensor.dtype, tensor.device.type, tensor.shape[1:], tensor.ndim
