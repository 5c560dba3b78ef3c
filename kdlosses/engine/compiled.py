"""Compiled versions of the row functions, one per static program, with a fallback to eager.

Each program has a function object of its own with isolated recompiles, so that many losses in
one process never meet torch.compile's recompile limit together.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_tiles: dict[Hashable, Callable[..., Any]] = {}
_failures: set[str] = set()


def run(
    function: Callable[..., tuple[Tensor, ...]],
    static: tuple[Hashable, ...],
    arguments: tuple[Tensor | None, ...],
    compiled: bool,
) -> tuple[Tensor, ...]:
    """Call ``function(*static, *arguments)``, compiled where asked and possible.

    Args:
        function: a pure function of tensors.
        static: leading arguments that are baked into the graph.
        arguments: tensors whose first axis is the rows (0-d tensors excepted), or None.
        compiled: False runs the function as it is.

    Returns:
        Tensors with the rows first.
    """
    if not compiled:
        return function(*static, *arguments)
    rows = _rows(arguments)
    if rows == 1:  # size 1 would specialise the graph: pad to 2, keep the first row
        padded = tuple(_twice(argument) for argument in arguments)
        return tuple(result[:1] for result in _call(function, static, padded))
    return _call(function, static, arguments)


def _call(
    function: Callable[..., tuple[Tensor, ...]],
    static: tuple[Hashable, ...],
    arguments: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    # Imported here: the compiler stack takes a second that a plain loss need not spend.
    from torch._dynamo import mark_dynamic
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    key = (function, static, *(_signature(argument) for argument in arguments))
    tile = _tiles.get(key)
    new = tile is None
    if tile is None:
        tile = _tiles[key] = torch.compile(  # type: ignore[call-overload]
            functools.partial(function, *static), fullgraph=True, isolate_recompiles=True
        )
    for argument in arguments:
        if argument is not None and argument.ndim:
            mark_dynamic(argument, 0)
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
            f"torch.compile is not usable here, the loss runs eagerly and slower: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def _rows(arguments: tuple[Tensor | None, ...]) -> int:
    return next(len(argument) for argument in arguments if argument is not None and argument.ndim)


def _twice(argument: Tensor | None) -> Tensor | None:
    if argument is None or not argument.ndim:
        return argument
    return torch.cat([argument, argument])


def _signature(argument: Tensor | None) -> Hashable:
    if argument is None:
        return None
    return argument.dtype, argument.device.type, argument.shape[1:]
