"""The final norm and the output head of a served teacher, read from its shards alone."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.context import load_model_config
from kdrun.models.failures import one_clear_line
from kdrun.models.heads import tabulated
from kdrun.models.locate import ModelSource, locate_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass
class Head:
    """What makes logits of the states before the final norm.

    Attributes:
        norm: the final norm, with float32 weights.
        weight: of the output head, ``[V, H]``.
        bias: ``[V]``, or None.
        logit_scale: factor on the logits.
        softcap: bound of the logits, or None.
    """

    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.norm.to(device)
        self.weight = self.weight.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)

    def cast(self, dtype: str) -> None:
        """Convert the head, whose type normed states have too."""
        import torch

        self.weight = self.weight.to(getattr(torch, dtype))
        self.bias = None if self.bias is None else self.bias.to(self.weight.dtype)

    def normed(self, states: Tensor) -> Tensor:
        """Apply the final norm, in float32, on the weights' device."""
        import torch

        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            found: Tensor = self.norm(states.to(self.weight.device, torch.float32))
        return found.to(self.weight.dtype)


def load_head(name: str, trust_remote_code: bool = False) -> Head:
    """Read the norm and the head of a model, in float32; no other weights are read.

    Args:
        name: folder or hub id of the model, with safetensors files.
        trust_remote_code: run the code that comes with the model.

    Raises:
        InputError: there is no such model, or it has no such norm or head.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = locate_model(name)
    if source.gguf_file or source.adapters:
        raise InputError(f"served.head: {source} must be a model with safetensors files")
    config = load_model_config(source, trust_remote_code)
    with one_clear_line(source, "model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise InputError(
            f"served.head: the output head of {source} is a {type(head).__name__}, no linear "
            "layer; use --set served.form=top_k"
        )
    place, norm = _final_norm(model, source)
    names = {tensor: f"{place}.{tensor}" for tensor in norm.state_dict()}
    weight = next(name for name, module in model.named_modules() if module is head) + ".weight"
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    inputs = model.get_input_embeddings()
    embedding = next(name for name, module in model.named_modules() if module is inputs) + ".weight"
    wanted = [*names.values(), embedding if tied else weight]
    bias = None if head.bias is None else weight.removesuffix("weight") + "bias"
    found = _read(source, [*wanted, *([] if bias is None else [bias])])
    norm = norm.to_empty(device="cpu").float()
    norm.load_state_dict({own: found[name].float() for own, name in names.items()})
    scale, softcap = tabulated(config.get_text_config())
    return Head(
        norm.eval().requires_grad_(False),
        found[wanted[-1]].float(),
        None if bias is None else found[bias].float(),
        scale,
        softcap,
    )


def _final_norm(model: Any, source: ModelSource) -> tuple[str, nn.Module]:
    """Find the norm after the last layer: the one beside the list of layers."""
    import torch

    for name, module in model.named_modules():
        children = dict(module.named_children())
        if not any(isinstance(child, torch.nn.ModuleList) for child in children.values()):
            continue
        norms = [
            child
            for child in children
            if type(children[child]).__name__.lower().endswith("norm") and "emb" not in child
        ]
        if len(norms) == 1:
            return f"{name}.{norms[0]}" if name else norms[0], children[norms[0]]
        break
    raise InputError(
        f"served.head: {source} has no final norm that kdrun recognises; use --set "
        "served.form=top_k"
    )


def _read(source: ModelSource, names: list[str]) -> dict[str, Tensor]:
    """Read tensors from the shards that have them; from the hub, only those shards."""
    from safetensors import safe_open

    index = _file(source, _INDEX)
    where: dict[str, str] = {}
    if index is not None:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    found: dict[str, Tensor] = {}
    for name in names:
        stored = _stored(where, name)
        path = _file(source, _SINGLE if stored is None else where[stored])
        if path is None:
            raise InputError(f"served.head: {source} has no safetensors file with {name}")
        with safe_open(path, "pt") as shard:
            key = _stored(shard.keys(), name)
            if key is None:
                raise InputError(f"served.head: {source} has no tensor {name}")
            found[name] = shard.get_tensor(key)
    return found


def _stored(keys: Collection[str], name: str) -> str | None:
    """Return under which key a tensor is stored, perhaps without the prefix of the whole model."""
    alike = [key for key in keys if key.endswith("." + name) or name.endswith("." + key)]
    return name if name in keys else alike[0] if len(alike) == 1 else None


def _file(source: ModelSource, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        source.path,
        name,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)
