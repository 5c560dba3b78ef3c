"""The hidden states of a model's layers, recorded while it is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdlosses import Hidden
from kdrun.errors import InputError
from kdrun.models.heads import causal_lm

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import ModuleList


def hidden_shape(config: Any) -> Hidden:
    """Return the number of layers and their width, from a model's configuration."""
    text = config.get_text_config()
    return Hidden(int(text.num_hidden_layers), int(text.hidden_size))


def find_layers(model: Any, name: str) -> ModuleList:
    """Return the layers of a causal language model, in their order.

    Args:
        model: also under peft, quantised or sharded.
        name: of the model in the message.

    Raises:
        InputError: the model has no list with as many modules as its configuration has layers.
    """
    from torch.nn import ModuleList

    inner = causal_lm(model)
    count = hidden_shape(inner.config).layers
    for _, module in inner.named_modules():  # outer modules come first
        if isinstance(module, ModuleList) and len(module) == count:
            return module
    raise InputError(
        f"features: kdrun does not find the {count} layers of the {name}, a "
        f"{type(inner).__name__}; remove --features"
    )


@contextmanager
def recorded(layers: ModuleList, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Record what layers hand on to the next one, by their number.

    States are kept as they are: operations here would be part of what a checkpointed layer
    computes again. When that happens, in the backward pass, this context has ended.

    Args:
        layers: from :func:`find_layers`.
        numbers: layers to record, counted from 1.
    """
    found: dict[int, Tensor] = {}

    def listen(number: int) -> Any:
        def record(_module: Any, _inputs: Any, outputs: Any) -> None:
            found[number] = outputs[0] if isinstance(outputs, tuple) else outputs

        return layers[number - 1].register_forward_hook(record)

    hooks = [listen(number) for number in sorted(set(numbers))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
