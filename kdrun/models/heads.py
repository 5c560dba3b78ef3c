"""Split a model into backbone and output head, so that its logits need never exist in full.

The model is called as usual, through any wrapper (DDP, FSDP, peft): its own ``forward`` is
replaced by one that runs the backbone and then calls the head, whose ``forward`` is replaced by
the consumer of hidden states and weight. Hooks therefore gather and reduce as usual.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from kdlosses import Logits, Projected
from kdrun.models.placement import place
from kdrun.models.routers import balancing_loss

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Consumer = Callable[["Logits | Projected"], dict[str, "Tensor"]]

_CONSUME = "consume_logits"
BALANCING = "aux_loss"
"""Key of the load-balancing loss of a mixture of experts in the outputs."""
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class HeadSplit:
    """How a model computes logits from its last hidden states.

    Attributes:
        logit_scale: factor on the head's output.
        softcap: bound of the scaled output, or None.
        reason: why the model cannot be split; None if it can.
        backbone: name of the submodule that returns the last hidden states.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    reason: str | None = None
    backbone: str = ""


def causal_lm(model: Any) -> PreTrainedModel:
    """Return the innermost causal language model, below peft."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def find_split(model: nn.Module) -> HeadSplit:
    """Read a model's post-processing from its configuration and verify it on the model.

    The probe makes the head return known numbers for a short row. The model's output must match
    the table, and the head's input must be the backbone's output.

    Args:
        model: a causal language model, on any device.

    Returns:
        The split; with a ``reason`` if the model itself must compute the logits.
    """
    import torch

    inner = causal_lm(model)
    head = inner.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return HeadSplit(reason=f"its output head is a {type(head).__name__}, not a linear layer")
    split = HeadSplit(*tabulated(inner.config.get_text_config()))
    training = inner.training
    inner.eval()
    try:
        with torch.no_grad(), in_16_bits_where_needed(inner):
            return _probe(inner, head, split)
    except Exception as error:  # any failure of the model's forward rules out the split
        return HeadSplit(reason=f"the probe of its head failed ({type(error).__name__}: {error})")
    finally:
        inner.train(training)


def in_16_bits_where_needed(model: Any) -> Any:
    """Return the context for a model whose attention cannot compute in the type of its weights."""
    import torch

    flash = str(model.config._attn_implementation).startswith("flash")
    needed = flash and model.dtype == torch.float32  # under mixed precision
    return torch.autocast(model.device.type, torch.bfloat16) if needed else nullcontext()


def tabulated(config: Any) -> tuple[float, float | None]:
    """Return scale and soft cap, by their names in configurations."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    for name in ("logits_scaling", "logits_mup_width_multiplier"):
        divisor = getattr(config, name, None) or 1.0
        scale *= divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return scale, next((cap for name in caps if (cap := getattr(config, name, None))), None)


def _probe(model: PreTrainedModel, head: nn.Linear, split: HeadSplit) -> HeadSplit:
    import torch

    device = head.weight.device
    row = torch.arange(4, device=device).unsqueeze(0) % head.weight.shape[0]
    known = torch.linspace(-60.0, 60.0, 4 * 8, device=device).view(1, 4, 8).to(head.weight.dtype)
    seen: list[Tensor] = []

    def record(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return known

    with _swapped(head, record), _last_hidden_states(model) as found:
        logits = model(input_ids=row, use_cache=False).logits
    exact = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = _TOLERANCE if exact else 2e-2

    def equal(one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and torch.allclose(
            one.float(), other.float(), rtol=tolerance, atol=tolerance
        )

    input_scale = 1.0
    if not equal(logits, _finished(known.float() * split.logit_scale, split.softcap)):
        # Some models scale the head's input instead of its output.
        input_scale = split.logit_scale
        bias: Tensor | None = head.bias
        if bias is not None or not equal(logits, _finished(known.float(), split.softcap)):
            return HeadSplit(reason="it changes its logits in a way that kdrun does not recognise")
    for name in _backbones(model, found):
        if len(seen) == 1 and equal(seen[0], input_scale * found[name]):
            again = model.get_submodule(name)(input_ids=row, use_cache=False).last_hidden_state
            if equal(again, found[name]):
                return replace(split, backbone=name)
    return HeadSplit(reason="its head is not applied to the backbone's last hidden states")


def _finished(scaled: Tensor, softcap: float | None) -> Tensor:
    return scaled if softcap is None else softcap * (scaled / softcap).tanh()


@contextmanager
def _last_hidden_states(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the last hidden states that submodules return, by the submodule's name."""
    found: dict[str, Tensor] = {}

    def listen(name: str, module: nn.Module) -> Any:
        def record(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            if getattr(outputs, "last_hidden_state", None) is not None:
                found[name] = outputs.last_hidden_state

        return module.register_forward_hook(record)

    hooks = [listen(name, module) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _backbones(model: nn.Module, found: dict[str, Tensor]) -> list[str]:
    """Sort the names of submodules that take token ids, from the outermost.

    Inputs are passed by name, so a wrapper that only forwards ``*args`` and ``**kwargs`` is none.
    """
    return [
        name
        for name, module in model.named_modules()
        if name in found and "input_ids" in inspect.signature(type(module).forward).parameters
    ]


@contextmanager
def _swapped(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Temporarily replace a module's ``forward``; hooks on the module still run."""
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
    """Add the keyword ``consume_logits`` to a model's ``forward``; calls without it are unchanged.

    Call this before the model is wrapped or prepared, so that wrappers use the new ``forward``.

    Args:
        model: a causal language model.
        split: how it computes logits.
        balanced: also return the load-balancing loss of its experts in training mode.
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

    # The signature decides which columns transformers passes and which arguments peft accepts.
    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    inner.forward = forward


def uninstall(model: nn.Module) -> None:
    """Restore the ``forward`` of the model's class."""
    vars(causal_lm(model)).pop("forward", None)


def _consume(
    model: PreTrainedModel,
    split: HeadSplit,
    inputs: dict[str, Any],
    consume: Consumer,
    wants_routers: bool,
) -> dict[str, Tensor]:
    import torch

    backbone = model.get_submodule(split.backbone)
    accepted = {*inspect.signature(type(backbone).forward).parameters}
    if wants_routers:  # backbones accept it as a keyword argument
        accepted.add("output_router_logits")
    wanted = {name: value for name, value in inputs.items() if name in accepted}
    outputs = backbone(**wanted, use_cache=False)
    hidden = outputs.last_hidden_state
    head = model.get_output_embeddings()

    def project(states: Tensor) -> dict[str, Tensor]:
        kind = states.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))  # the losses leave autocast
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
    """Call a model prepared by :func:`install`, or its outermost wrapper.

    Packed rows have no mask: ``position_ids`` separate their examples.
    """
    result: dict[str, Tensor] = model(
        input_ids=input_ids, attention_mask=attention_mask, **inputs, **{_CONSUME: consume}
    )
    return result


class Teacher(Protocol):
    """Source of the teacher's side of a batch: a live model, a cache or a server."""

    split: HeadSplit

    @property
    def exact(self) -> bool:
        """Whether it gives full distributions, which most measures need."""

    def to(self, device: torch.device) -> None:
        """Move to the batches' device."""

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shift_labels: Tensor,
        **inputs: Any,
    ) -> Any:
        """Return a teacher for :class:`kdlosses.KDObjective`, valid at the supervised positions."""


class FrozenTeacher:
    """A teacher that stays in eval mode, without gradients and outside any optimiser.

    It is deliberately not an ``nn.Module``, so that it can never become part of the student, its
    optimiser or its checkpoints.

    Args:
        model: the teacher's model.
        split: how it computes logits.
        devices: the devices that hold it; None for the device of the batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        split: HeadSplit,
        devices: Sequence[int | str] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.split = split
        self._devices = devices
        self._elsewhere: _Elsewhere | None = None
        self.exact = True
        install(self.model, split)

    def to(self, device: torch.device) -> None:
        """Move the weights to the batches' device, or to the teacher's own devices."""
        if self._devices is None:
            self.model.to(device)
            return
        if self._elsewhere is None:
            place(self.model, self._devices)
        self._elsewhere = _Elsewhere(self.model, device)

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Return the source of the teacher's logits (:class:`kdlosses.Projected` or logits).

        It is on the batches' device, wherever the teacher runs. The projection itself happens
        later, chunk by chunk. ``shift_labels`` are not passed to the model, which covers every
        position; a cache has only the supervised ones.
        """
        import torch

        del shift_labels

        self.model.eval()
        found: list[Logits | Projected] = []

        def keep(source: Logits | Projected) -> dict[str, Tensor]:
            found.append(source)
            return {}

        features = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if self._elsewhere is not None:
            features = self._elsewhere.send(features)
        with torch.no_grad():
            call(self.model, keep, **features)
        return found[0] if self._elsewhere is None else self._elsewhere.fetch(found[0])


class _Elsewhere:
    """The way between the batches' device and a teacher on other devices.

    Losses project with the head's weight chunk by chunk, so that a copy of it stays on the batches'
    device: logits would be larger than hidden states and weight together, and fetching the weight
    again for each batch would take longer than the loss.

    Args:
        model: the teacher's model, on its devices.
        device: the batches' device.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        head = model.get_output_embeddings()
        self._model, self._device = model, device
        self._weight = head.weight.detach().to(device)
        bias = getattr(head, "bias", None)
        self._bias = None if bias is None else bias.detach().to(device)

    def send(self, features: dict[str, Any]) -> dict[str, Any]:
        """Move the inputs of the model to it."""
        first = self._model.device
        return {key: x.to(first) if hasattr(x, "to") else x for key, x in features.items()}

    def fetch(self, source: Logits | Projected) -> Logits | Projected:
        """Move hidden states, or the logits of a model without split, to the batches' device."""
        if isinstance(source, Logits):
            return Logits(source.values.to(self._device))
        return Projected(
            source.hidden.to(self._device),
            self._weight,
            self._bias,
            source.logit_scale,
            source.softcap,
        )
