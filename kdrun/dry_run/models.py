"""Models without weights: their sizes, and what a step keeps of them for its backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.models.adapters import add_adapters
from kdrun.models.heads import causal_lm
from kdrun.models.pairs import check_head
from kdrun.models.quantize import is_quantized

if TYPE_CHECKING:
    import torch

    from kdrun.config.sections import RunConfig
    from kdrun.models.locate import ModelSource
    from kdrun.models.pairs import Pair


@dataclass(frozen=True)
class ModelSize:
    """What is known of a model from its configuration.

    Attributes:
        kind: its type.
        parameters: tied ones counted once.
        trained: those of them that are trained.
        weights: bytes of all.
        trained_weights: bytes of the trained ones.
        head: shape of the output head.
        trained_head: whether the head is trained.
        item_size: bytes of an element of the hidden states.
        largest_block: bytes of the block of layers that has most.
        outside_blocks: bytes of what is in no block: embeddings, head and last norm.
    """

    kind: str
    parameters: int
    trained: int
    weights: int
    trained_weights: int
    head: tuple[int, int]
    trained_head: bool
    item_size: int
    largest_block: int
    outside_blocks: int


class Shadow:
    """A model whose tensors have shapes and types but no content.

    Args:
        source: for messages.
        model_config: of transformers.
        config: of the run; gives the type of the weights.
        pair: gives the size of the vocabulary.
    """

    def __init__(
        self, source: ModelSource, model_config: Any, config: RunConfig, pair: Pair
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(
                model_config,
                dtype=getattr(torch, config.model.dtype),
                trust_remote_code=config.model.trust_remote_code,
            )
        check_head(self.model, pair, str(source))

    def adapt(self, config: RunConfig) -> None:
        """Put the run's adapters on it."""
        import torch

        with torch.device("meta"):
            self.model = add_adapters(self.model, config.lora, "", config.training.seed)

    def size(self, quantized: bool = False) -> ModelSize:
        """Parameters and bytes.

        Args:
            quantized: whether the weights of layers are stored in 8 bits.
        """
        every = list(self.model.parameters())
        trained = [p for p in every if p.requires_grad]
        head = self.model.get_output_embeddings().weight
        inner = causal_lm(self.model)
        saved = 0
        if quantized:
            layers = [x for x in inner.modules() if is_quantized(x, inner.get_output_embeddings())]
            saved = sum(_saved_by_8_bits(layer.weight) for layer in layers)
        kinds = set(inner._no_split_modules or ())
        blocks = [
            _bytes(list(module.parameters()))
            for module in inner.modules()
            if type(module).__name__ in kinds
        ]
        return ModelSize(
            kind=self.model.config.model_type,
            parameters=_elements(every),
            trained=_elements(trained),
            weights=_bytes(every) - saved,
            trained_weights=_bytes(trained),
            head=(head.shape[0], head.shape[1]),
            trained_head=head.requires_grad,
            item_size=head.element_size(),
            largest_block=max(blocks, default=0),
            outside_blocks=_bytes(every) - sum(blocks),
        )

    def activations(self, rows: int, length: int, checkpointing: bool) -> int | None:
        """Bytes that the backbone keeps for the backward pass of a batch.

        Args:
            rows: of the batch.
            length: tokens a row.
            checkpointing: keep each layer's input alone, and one layer's activations at a time.

        Returns:
            None where the model's code needs real numbers to run.
        """
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        inner = causal_lm(self.model)
        mode = FakeTensorMode()
        with mode:
            _pretend(inner)
        own = {_place(x) for x in (*inner.parameters(), *inner.buffers())}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if _place(tensor) not in own:
                kept[_place(tensor)] = tensor.untyped_storage()
            return tensor

        inner.train()
        try:
            with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                ids = torch.zeros(rows, length, dtype=torch.long)
                hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
        except Exception:  # whatever a foreign forward does with contents that are not there
            return None
        total = sum(storage.nbytes() for storage in kept.values())
        if not checkpointing:
            return int(total)
        layers = max(1, int(inner.config.get_text_config().num_hidden_layers))
        inputs = hidden.numel() * hidden.element_size()
        return int(layers * inputs + total / layers)


def _pretend(model: Any) -> None:
    """Give a model on the meta device tensors that claim to lie on the CPU.

    A forward pass then takes the same operators as a real one; on the meta device itself attention
    masks cannot be made.
    """
    import torch

    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False):
            if id(old) not in made:  # tied weights stay tied
                empty = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = torch.nn.Parameter(empty, requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _place(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _elements(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _saved_by_8_bits(weight: torch.Tensor) -> int:
    """Bytes that a matrix no longer takes; each output has a scale."""
    scales = weight.shape[0] * weight.element_size()
    return weight.numel() * (weight.element_size() - 1) - scales


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
