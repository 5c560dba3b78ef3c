"""Models whose weights are sharded across processes (FSDP2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, computed_in: torch.dtype | None = None) -> PreTrainedModel:
    """Shard a model's weights across all processes, in place: each block, then the rest.

    Embeddings and output head belong to the outermost group, whether tied or not. The
    plan of transformers 5.24 puts a tied weight into a group with the embedding only: from
    the second forward pass on, the head would compute with the weights of the first.

    Args:
        model: complete on every process and not yet wrapped; a process group must exist.
        computed_in: type in which weights are gathered and used; None keeps their own. Gradients
            are averaged in float32.

    Returns:
        The model, which transformers' Trainer does not wrap again: gradients are averaged
        over the processes, checkpoints are gathered.
    """
    import torch.distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.distributed import DistributedConfig

    policy = MixedPrecisionPolicy()
    if computed_in is not None:
        policy = MixedPrecisionPolicy(param_dtype=computed_in, reduce_dtype=torch.float32)
    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    sharded: Any = model
    sharded.config.distributed_config = DistributedConfig(
        fsdp_size=torch.distributed.get_world_size()
    )
    sharded._is_distributed_loading_by_transformers = True
    sharded._is_fsdp_managed_module = True
    return model


def save_shards(model: Any, optimizer: Any, folder: Path) -> None:
    """Save trained weights and the optimiser's state, each process its part.

    Args:
        model: sharded by :func:`shard`.
        optimizer: torch optimiser of this model.
        folder: folder to create; all processes must call this.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    save(_trained_state(model, optimizer), checkpoint_id=folder)


def load_shards(model: Any, optimizer: Any, folder: Path) -> None:
    """Load what :func:`save_shards` saved, also with another number of processes.

    Args:
        model: sharded by :func:`shard`; changed in place.
        optimizer: changed in place; None loads only weights.
        folder: folder of the shards; all processes must call this.
    """
    from torch.distributed.checkpoint.state_dict import (
        set_model_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load

    state = _trained_state(model, optimizer)
    load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=_options(strict=False))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_options())


def _trained_state(model: Any, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
    )
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves some weights gathered
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=_options())}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_options())
    return state


def _options(strict: bool = True) -> Any:
    """Frozen weights, such as those below adapters, come with the model."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(ignore_frozen_params=True, strict=strict)


def gather(model: Any) -> dict[str, Tensor]:
    """Gather the full weights of a model sharded by :func:`shard`, on the CPU of every process.

    A tied weight appears once, as without sharding. All processes must call this; afterwards
    transformers saves the model like any other.
    """
    from kdrun.models.heads import causal_lm

    inner: Any = causal_lm(model)
    tied = set(getattr(inner, "all_tied_weights_keys", None) or ())
    inner.config.distributed_config = None
    return {name: _whole(value) for name, value in model.state_dict().items() if name not in tied}


def gather_trained(model: Any) -> dict[str, Tensor]:
    """Gather the full trained weights, such as those of adapters; the model stays sharded.

    All processes must call this.
    """
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    return {name: _whole(x) for name, x in model.state_dict().items() if name in trained}


def _whole(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
