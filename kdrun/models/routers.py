"""The load-balancing loss of a mixture of experts, as the model's own class computes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FUNCTION = "load_balancing_loss_func"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_ARGUMENTS = {"gate_logits", "num_experts", "top_k", "attention_mask"}


@dataclass(frozen=True)
class Balancing:
    """A model's load-balancing loss.

    Attributes:
        coefficient: its weight besides the objective; 0 if the model has none or disables it.
        note: a line about it, or None.
    """

    coefficient: float = 0.0
    note: str | None = None


def find_balancing(model: PreTrainedModel) -> Balancing:
    """Determine a model's load-balancing loss from its class and configuration.

    As in transformers, ``output_router_logits`` in the configuration decides.

    Args:
        model: a causal language model.
    """
    config = model.config.get_text_config()
    coefficient = _coefficient(model, config)
    if not coefficient:
        return Balancing()
    if not getattr(config, "output_router_logits", False):
        return Balancing(
            note="the load-balancing loss of the student's experts is not added; to add it, set "
            "output_router_logits to true in its config.json"
        )
    if _own_function(model) is None:
        return Balancing(
            note="the load-balancing loss of the student's experts is not added: "
            f"{type(model).__name__} computes none that kdrun recognises"
        )
    return Balancing(
        coefficient,
        f"the load-balancing loss of the student's experts is added with weight {coefficient:g} "
        "(router_aux_loss_coef and output_router_logits in its config.json)",
    )


def balancing_loss(
    model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None
) -> Tensor:
    """Compute the load-balancing loss of a batch, without its coefficient.

    Args:
        model: a model with a :class:`Balancing` whose coefficient is not 0.
        router_logits: router logits of its layers, for every position.
        attention_mask: excludes padding; None counts every position.
    """
    function = _own_function(model)
    assert function is not None, "such a model has a function"
    owner: Any = model
    experts, chosen = owner.num_experts, owner.num_experts_per_tok
    found: Tensor = function(router_logits, experts, chosen, attention_mask)
    return found


def _coefficient(model: PreTrainedModel, config: Any) -> float:
    for owner in (model, config):
        for name in _COEFFICIENTS:
            value = getattr(owner, name, None)
            if isinstance(value, int | float):
                return float(value)
    return 0.0


def _own_function(model: PreTrainedModel) -> Callable[..., Any] | None:
    """Return the function in the class's module; None if missing or with another signature."""
    for kind in type(model).__mro__:
        function = getattr(sys.modules.get(kind.__module__), _FUNCTION, None)
        if function is not None:
            known = set(inspect.signature(function).parameters) == _ARGUMENTS
            has_sizes = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
            return function if known and has_sizes else None
    return None
