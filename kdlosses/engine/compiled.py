"""Compiled versions of the row functions, one per static program, with a fallback to eager.

Each program has its own function object and recompilations, so that many losses in one process do
not share torch.compile's recompile limit.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

# A tensor whose first axis is the rows, a 0-d tensor, or a tuple of these.
Argument = Tensor | tuple[Tensor, ...]

_tiles: dict[Hashable, Callable[..., Any]] = {}
_failures: set[str] = set()


def run(
    function: Callable[..., tuple[Tensor, ...]],
    static: tuple[Hashable, ...],
    arguments: tuple[Argument, ...],
    compiled: bool,
) -> tuple[Tensor, ...]:
    """Call ``function(*static, *arguments)``, compiled if requested and possible.

    Args:
        function: a pure function of tensors.
        static: leading arguments that are constants of the graph.
        arguments: tensors whose first axis is the rows (except 0-d tensors), or tuples of them.
        compiled: False runs the function eagerly.

    Returns:
        Tensors whose first axis is the rows.
    """
    if not compiled:
        return function(*static, *arguments)
    if any(tensor.ndim and len(tensor) == 1 for tensor in _tensors(arguments)):
        # Size 1 would specialise the graph, so pad to 2 rows and keep the first.
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
    # Imported here, because plain losses do not need the compiler, which takes a second.
    from torch._dynamo import mark_dynamic
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    from kdlosses.engine.reuse import ReuseExponentials

    key = (function, static, *(_signature(tensor) for tensor in _tensors(arguments)))
    tile = _tiles.get(key)
    new = tile is None
    if tile is None:
        # Only the rows, marked below, are dynamic: tiles share a code object, and widths that
        # differ between programs would otherwise become dynamic as well.
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
            if new:  # hide warnings of the compiler from the caller's filters
                warnings.simplefilter("ignore")
            return tile(*arguments)  # type: ignore[no-any-return]
    except (TorchDynamoException, InductorError) as error:
        # Raised before execution; the function is pure, so running it eagerly is safe.
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
