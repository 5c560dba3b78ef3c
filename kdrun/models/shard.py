"""Models whose weights are spread over processes (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """Spread a model's weights over all processes, in place: each block, then what is left.

    Embeddings and output head belong to the outermost group, whether they are tied or not. The
    plan of transformers 5.24 puts a tied weight into a group that knows the embedding only: from
    the second forward pass on, the head would compute with the weights of the first.

    Args:
        model: whole on every process, before anything wraps it; a process group has to be there.

    Returns:
        The model, which transformers' Trainer from now on leaves to itself: gradients are averaged
        over the processes, checkpoints are gathered.
    """
    import torch.distributed
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed import DistributedConfig

    blocks = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(model)
    sharded: Any = model
    sharded.config.distributed_config = DistributedConfig(
        fsdp_size=torch.distributed.get_world_size()
    )
    sharded._is_distributed_loading_by_transformers = True
    sharded._is_fsdp_managed_module = True
    return model


def gather(model: Any) -> dict[str, Tensor]:
    """The whole weights of a model that :func:`shard` spread, on the CPU of every process.

    A tied weight appears once, as where nothing is spread. All processes have to call this; from
    then on transformers saves the model like any other.
    """
    from torch.distributed.tensor import DTensor

    from kdrun.models.heads import causal_lm

    inner: Any = causal_lm(model)
    tied = set(getattr(inner, "all_tied_weights_keys", None) or ())
    inner.config.distributed_config = None
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        for name, value in model.state_dict().items()
        if name not in tied
    }
