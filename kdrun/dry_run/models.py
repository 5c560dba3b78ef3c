"""Models without weights: their sizes, and their activations for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdrun.models.adapters import add_adapters
from kdrun.models.heads import causal_lm
from kdrun.models.pairs import check_head
from kdrun.models.quantize import Kind, saved_bytes

if TYPE_CHECKING:
    import torch

    from kdrun.config.base import DType
    from kdrun.config.sections import RunConfig
    from kdrun.models.locate import ModelSource
    from kdrun.models.pairs import Pair


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, computed from its configuration.

    Attributes:
        kind: type of the model.
        parameters: number of parameters, with tied ones counted once.
        trained: number of trained parameters.
        weights: bytes of all parameters.
        trained_weights: bytes of the trained parameters.
        head: shape of the output head.
        trained_head: whether the head is trained.
        item_size: bytes of an element of the hidden states.
        largest_block: bytes of the largest block of layers.
        outside_blocks: bytes outside the blocks: embeddings, head and last norm.
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
    """A model whose tensors have shapes and data types but no content.

    Args:
        source: source of the model, for messages.
        model_config: configuration of transformers.
        dtype: data type of the weights.
        trust_remote_code: whether the model may run its own code.
        pair: the pair, for the vocabulary size.
        quantization: how the weights of its layers are stored.
    """

    def __init__(
        self,
        source: ModelSource,
        model_config: Any,
        dtype: DType,
        trust_remote_code: bool,
        pair: Pair,
        quantization: Kind | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(
                model_config,
                dtype=getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            )
        check_head(self.model, pair, str(source))
        self._saved = saved_bytes(self.model, quantization)

    def adapt(self, config: RunConfig) -> None:
        """Add the adapters of the run."""
        import torch

        with torch.device("meta"):
            self.model = add_adapters(self.model, config.lora, "", config.training.seed)

    def size(self) -> ModelSize:
        """The sizes of the model."""
        every = list(self.model.parameters())
        trained = [p for p in every if p.requires_grad]
        head = self.model.get_output_embeddings().weight
        inner = causal_lm(self.model)
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
            weights=_bytes(every) - self._saved,
            trained_weights=_bytes(trained),
            head=(head.shape[0], head.shape[1]),
            trained_head=head.requires_grad,
            item_size=head.element_size(),
            largest_block=max(blocks, default=0),
            outside_blocks=_bytes(every) - sum(blocks),
        )

    def copies(self, autocast: torch.dtype, head: bool = True) -> int:
        """Bytes of the copies of weights that autocast keeps until a step's backward pass.

        Args:
            autocast: type of the products.
            head: whether to count the copy for the output head, which lives as long as the loss.
        """
        import torch

        inner = causal_lm(self.model)
        last = inner.get_output_embeddings()
        layers = {id(x.weight): x.weight for x in inner.modules() if isinstance(x, torch.nn.Linear)}
        cast = [x for x in layers.values() if x.dtype != autocast and x is not last.weight]
        if head and last.weight.dtype != autocast:
            cast.append(last.weight)
        return autocast.itemsize * _elements(cast)

    def activations(
        self, rows: int, length: int, checkpointing: bool, autocast: torch.dtype | None = None
    ) -> int | None:
        """Bytes that the backbone keeps for the backward pass of a batch.

        Args:
            rows: rows of the batch.
            length: tokens per row.
            checkpointing: whether to keep only the inputs of layers and the activations of one
                layer at a time.
            autocast: type of the products in mixed precision; None without it.

        Returns:
            The bytes; None if the model's code needs real values to run.
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
            with (
                mode,
                torch.autocast("cpu", autocast, enabled=autocast is not None),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            ):
                ids = torch.zeros(rows, length, dtype=torch.long)
                hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
        except Exception:  # a forward pass of remote code may need real values
            return None
        total = sum(storage.nbytes() for storage in kept.values())
        if autocast is not None:
            total -= self.copies(autocast, head=False)
        if not checkpointing:
            return int(total)
        layers = max(1, int(inner.config.get_text_config().num_hidden_layers))
        inputs = hidden.numel() * hidden.element_size()
        return int(layers * inputs + total / layers)


def _pretend(model: Any) -> None:
    """Replace the meta tensors of a model with fake CPU tensors.

    A forward pass then uses the same operators as a real one; attention masks cannot be created on
    the meta device.
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


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
