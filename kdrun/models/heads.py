"""A model as backbone and output head, so that its logits need never exist as a whole.

The model is called as always, through whatever wraps it (DDP, FSDP, peft): its own ``forward`` is
replaced by one that runs the backbone and then calls the head with the head's ``forward`` swapped
for the consumer of hidden states and weight. So hooks gather and reduce as they always do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kdlosses import Logits, Projected
from kdrun.models.routers import balancing_loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Consumer = Callable[["Logits | Projected"], dict[str, "Tensor"]]

_CONSUME = "consume_logits"
BALANCING = "aux_loss"
"""In what a call returns, the load-balancing loss of a mixture of experts."""
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class HeadSplit:
    """How a model makes logits from its last hidden states.

    Attributes:
        logit_scale: factor on the head's output.
        softcap: bound of the scaled output, or None.
        reason: why the model cannot be split; None where it can.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    reason: str | None = None


def causal_lm(model: Any) -> PreTrainedModel:
    """The innermost causal language model, below peft."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def find_split(model: nn.Module) -> HeadSplit:
    """Read a model's post-processing from its configuration and compare it with the model itself.

    The probe makes the head return known numbers for a short row. What the model gives back must
    be what the table says, and what the head was given must be the backbone's output.

    Args:
        model: a causal language model, on any device.

    Returns:
        The split; with a ``reason`` where the logits have to be made by the model.
    """
    import torch

    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return HeadSplit(reason=f"its output head is a {type(head).__name__}, not a linear layer")
    if inner.base_model is inner:
        return HeadSplit(reason="its backbone has no name of its own")
    split = HeadSplit(*_tabulated(inner.config.get_text_config()))
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad():
            problem = _probe(inner, head, split)
    except Exception as error:  # any failure of a foreign forward means: do not rely on the split
        problem = f"the probe of its head failed ({type(error).__name__}: {error})"
    finally:
        inner.train(training)
    return split if problem is None else HeadSplit(reason=problem)


def _tabulated(config: Any) -> tuple[float, float | None]:
    """Scale and soft cap by the names under which configurations carry them."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale *= divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return scale, getattr(config, "final_logit_softcapping", None)


def _probe(model: PreTrainedModel, head: nn.Linear, split: HeadSplit) -> str | None:
    import torch

    device = head.weight.device
    row = torch.arange(4, device=device).unsqueeze(0) % head.weight.shape[0]
    known = torch.linspace(-60.0, 60.0, 4 * 8, device=device).view(1, 4, 8).to(head.weight.dtype)
    seen: list[Tensor] = []

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return known

    with _swapped(head, record):
        logits = model(input_ids=row, use_cache=False).logits
    hidden = model.base_model(input_ids=row, use_cache=False).last_hidden_state
    scaled = known.float() * split.logit_scale
    if split.softcap is not None:
        scaled = split.softcap * torch.tanh(scaled / split.softcap)
    tolerance = _TOLERANCE if head.weight.dtype == torch.float32 else 2e-2
    if not torch.allclose(logits.float(), scaled, rtol=tolerance, atol=tolerance):
        return "it changes its logits in a way that is not known here"
    if len(seen) != 1 or not torch.allclose(seen[0], hidden, rtol=tolerance, atol=tolerance):
        return "its head is not applied to the backbone's last hidden states"
    return None


@contextmanager
def _swapped(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's ``forward`` for a while; hooks on the module still run."""
    previous = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def install(model: nn.Module, split: HeadSplit, balanced: bool = False) -> None:
    """Teach a model's ``forward`` the keyword ``consume_logits``; without it nothing changes.

    To be done before the model is wrapped or prepared, so that wrappers call the new ``forward``.

    Args:
        model: a causal language model.
        split: how it makes logits.
        balanced: let calls in training mode return the load-balancing loss of its experts too.
    """
    inner = causal_lm(model)
    original = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        consume = kwargs.pop(_CONSUME, None)
        if consume is None:
            return original(*args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        wants_routers = balanced and inner.training
        if wants_routers:
            inputs["output_router_logits"] = True
        if split.reason is None:
            return _consume(inner, split, inputs, consume, wants_routers)
        outputs = original(*args, use_cache=False, **inputs)
        result = consume(Logits(outputs.logits))
        return {**result, BALANCING: outputs.aux_loss} if wants_routers else result

    # The signature decides which columns transformers passes on and which arguments peft accepts.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    inner.forward = forward


def uninstall(model: nn.Module) -> None:
    """Give the model its class's ``forward`` back."""
    vars(causal_lm(model)).pop("forward", None)


def _consume(
    model: PreTrainedModel,
    split: HeadSplit,
    inputs: dict[str, Any],
    consume: Consumer,
    wants_routers: bool,
) -> dict[str, Tensor]:
    accepted = {*inspect.signature(type(model.base_model).forward).parameters}
    if wants_routers:  # backbones take it among their keyword arguments
        accepted.add("output_router_logits")
    wanted = {name: value for name, value in inputs.items() if name in accepted}
    outputs = model.base_model(**wanted, use_cache=False)
    hidden = outputs.last_hidden_state
    head = model.get_output_embeddings()

    def project(states: Tensor) -> dict[str, Tensor]:
        source = Projected(states, head.weight, head.bias, split.logit_scale, split.softcap)
        return consume(source)

    with _swapped(head, project):
        result: dict[str, Tensor] = head(hidden)
    if wants_routers:
        mask = inputs.get("attention_mask")
        result = {**result, BALANCING: balancing_loss(model, outputs.router_logits, mask)}
    return result


def call(
    model: nn.Module,
    consume: Consumer,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **inputs: Any,
) -> dict[str, Tensor]:
    """Call a model on which :func:`install` was done; the outermost wrapper may be given.

    Packed rows come without a mask: ``position_ids`` tell their examples apart.
    """
    result: dict[str, Tensor] = model(
        input_ids=input_ids, attention_mask=attention_mask, **inputs, **{_CONSUME: consume}
    )
    return result


class Teacher(Protocol):
    """Where the teacher's side of a batch comes from: a live model, or a cache of one."""

    split: HeadSplit

    def to(self, device: torch.device) -> None:
        """Move to the device of the batches."""

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shift_labels: Tensor,
        **inputs: Any,
    ) -> Any:
        """A teacher for :class:`kdlosses.KDObjective`, right at the supervised positions."""


class FrozenTeacher:
    """A teacher: in eval mode whatever happens around it, without gradients, in no optimiser.

    It is no ``nn.Module`` on purpose, so that it can never become part of the student, its
    optimiser or its checkpoints.

    Args:
        model: the teacher's model.
        split: how it makes logits.
    """

    def __init__(self, model: PreTrainedModel, split: HeadSplit) -> None:
        self.model = model.eval().requires_grad_(False)
        self.split = split
        install(self.model, split)

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Where the teacher's logits of a batch come from (:class:`kdlosses.Projected` or logits).

        The projection itself happens later, a chunk at a time. ``shift_labels`` are no input of
        the model: it answers for every position, where a cache has the supervised ones only.
        """
        import torch

        del shift_labels

        self.model.eval()
        found: list[Logits | Projected] = []

        def keep(source: Logits | Projected) -> dict[str, Tensor]:
            found.append(source)
            return {}

        with torch.no_grad():
            call(self.model, keep, input_ids, attention_mask, **inputs)
        return found[0]
