"""Converting the weights of a model to another type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Convert the weights of a model in place, as if it had been loaded in this type.

    Unlike ``model.to``, this leaves values alone that are computed and not loaded, such as the
    frequencies of rotary embeddings, which 16 bits would spoil.

    Returns:
        The model.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    return model
