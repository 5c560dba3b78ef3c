"""Models whose weights are spread over processes (FSDP2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
