"""Check that a model separates the examples of a packed row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.heads import causal_lm

if TYPE_CHECKING:
    from torch import Tensor, nn

_FIRST, _SECOND = 5, 7
_POSITIONS = "position_ids"


def check_packing(model: nn.Module, name: str, batch_size: int = 2) -> None:
    """Refuse a model in which the examples of a row attend to each other.

    Args:
        model: a causal language model, on any device.
        name: its name in the message.
        batch_size: rows per batch.

    Raises:
        InputError: they do; gives the reason.
    """
    problem = packing_problem(model, batch_size)
    if problem is not None:
        inner: Any = causal_lm(model)
        used = inner.config._attn_implementation
        raise InputError(
            f"data.packing: {name} {problem} (model.attention={used}); set data.packing=false, or "
            "choose another model.attention"
        )


def packing_problem(model: nn.Module, batch_size: int = 2) -> str | None:
    """Return why a model cannot separate the examples of a row; None if it can.

    The second of two examples in a row must give the same output whatever the first one is, and
    the same as alone. Two rows are checked in one batch, unless batches have one row: flash
    attention separates the examples of a single row only.

    Args:
        model: a causal language model, on any device.
        batch_size: rows per batch.
    """
    import torch

    inner = causal_lm(model)
    if _POSITIONS not in inspect.signature(inner.forward).parameters:
        return f"({inner.config.model_type}) takes no positions, which separate examples"
    vocab_size = inner.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _FIRST + _SECOND, device=inner.device) % vocab_size
    one, other, second = ids[:_FIRST], ids[_FIRST : 2 * _FIRST], ids[2 * _FIRST :]
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            parts = [[one, other]] if batch_size > 1 else [[one], [other]]
            after_one, after_other = (x for part in parts for x in _packed(inner, part, second))
            alone = inner(input_ids=second.unsqueeze(0), use_cache=False).logits[0].float()
    except Exception as error:  # any failure of the model's forward rules it out
        return f"fails on packed rows ({type(error).__name__}: {str(error).splitlines()[:1]})"
    finally:
        inner.train(training)
    scale = float(alone.abs().max())
    if not torch.allclose(after_one, after_other, rtol=0, atol=1e-6 * scale):
        return f"({inner.config.model_type}) lets the examples of a row attend to each other"
    exact = inner.dtype in (torch.float32, torch.float64)
    if not torch.allclose(after_one, alone, rtol=0, atol=(1e-4 if exact else 5e-2) * scale):
        return f"({inner.config.model_type}) does not start afresh with each example of a row"
    return None


def _packed(model: Any, firsts: Sequence[Tensor], second: Tensor) -> Tensor:
    """Return the logits of the second example, after each of several equally long first ones."""
    import torch

    rows = torch.stack([torch.cat([first, second]) for first in firsts])
    lengths = (len(firsts[0]), len(second))
    positions = torch.cat([torch.arange(n, device=rows.device) for n in lengths])
    positions = positions.repeat(len(rows), 1)
    logits = model(input_ids=rows, position_ids=positions, use_cache=False).logits
    second_logits: Tensor = logits[:, lengths[0] :].float()
    return second_logits
