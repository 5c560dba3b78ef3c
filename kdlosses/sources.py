"""Sources of distributions: logits, or hidden states and a projection.

A source has a leading shape and a vocabulary. :class:`Postprocess` transforms the raw logits of
every source before the softmax (scale, soft cap).
"""

from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor

from kdlosses.vocabulary import WHOLE, Group, Shard, Vocabulary


@dataclass(frozen=True)
class Postprocess:
    """Transformation of the product of hidden states and head before the softmax.

    Attributes:
        logit_scale: factor on the logits (Cohere's ``logit_scale``, one over Granite's
            ``logits_scaling``).
        softcap: bound of the scaled logits, ``softcap * tanh(z / softcap)`` (Gemma 2).
    """

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Apply scale, then cap, in float32 (float64 stays float64)."""
        logits = raw if raw.dtype == torch.float64 else raw.float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


IDENTITY = Postprocess()


@dataclass(frozen=True)
class Logits:
    """Logits stored as a tensor.

    Args:
        values: raw (unnormalised) scores ``[..., V]``, floating-point.
    """

    values: Tensor

    def __post_init__(self) -> None:
        require_float("logits", self.values)
        if self.values.ndim < 1:
            raise ValueError("logits: needs at least the vocabulary axis, got a scalar")

    @property
    def leading_shape(self) -> torch.Size:
        """The shape without the vocabulary axis."""
        return self.values.shape[:-1]

    @property
    def vocab_size(self) -> int:
        """Width of the vocabulary axis."""
        return self.values.shape[-1]

    @property
    def post(self) -> Postprocess:
        """No post-processing, because stored logits are final."""
        return IDENTITY

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that may receive a gradient."""
        return (self.values,)

    @property
    def width(self) -> int:
        """Width of the gathered rows, here the logits themselves."""
        return self.vocab_size

    @property
    def vocabulary(self) -> Vocabulary:
        """All tokens."""
        return WHOLE

    def columns(self, vocab_size: int) -> int:
        """How many of the first ``vocab_size`` tokens this process has."""
        return vocab_size


@dataclass(frozen=True)
class Projected:
    """Logits that are not stored, given by hidden states and the output projection.

    ``logits = softcap(logit_scale * (hidden @ weight.T + bias))``.

    Args:
        hidden: last hidden states ``[..., H]``, after the final norm.
        weight: output embedding ``[V, H]``.
        bias: ``[V]``, or None.
        logit_scale: factor on the logits, e.g. Cohere's ``logit_scale``.
        softcap: bound of the logits as in Gemma 2, or None.

    Raises:
        ValueError: inconsistent shapes.
        TypeError: tensors that are not floating-point.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        require_float("hidden", self.hidden)
        require_float("weight", self.weight)
        if self.weight.ndim != 2 or self.hidden.ndim < 1:
            raise ValueError(
                f"Projected: expected hidden [..., H] and weight [V, H], got "
                f"{list(self.hidden.shape)} and {list(self.weight.shape)}"
            )
        if self.hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"Projected: hidden has width {self.hidden.shape[-1]} but weight expects "
                f"{self.weight.shape[1]}"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"Projected: bias has shape {list(self.bias.shape)}, expected "
                f"[{self.weight.shape[0]}]"
            )

    @property
    def leading_shape(self) -> torch.Size:
        """The shape without the hidden axis."""
        return self.hidden.shape[:-1]

    @property
    def vocab_size(self) -> int:
        """Number of rows of the projection."""
        return self.weight.shape[0]

    @property
    def post(self) -> Postprocess:
        """Scale and soft cap."""
        return Postprocess(self.logit_scale, self.softcap)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that may receive a gradient."""
        head = (self.hidden, self.weight)
        return head if self.bias is None else (*head, self.bias)

    @property
    def width(self) -> int:
        """Width of the gathered rows, the hidden states."""
        return self.hidden.shape[-1]

    @property
    def vocabulary(self) -> Vocabulary:
        """All tokens."""
        return WHOLE

    def columns(self, vocab_size: int) -> int:
        """How many of the first ``vocab_size`` tokens this process has."""
        return vocab_size


@dataclass(frozen=True)
class VocabParallel(Projected):
    """The shard of this process of an output head sharded across processes.

    Each process of the group has consecutive rows of the whole ``weight`` (and ``bias``), in the
    order of the processes, and the same hidden states. Losses and their gradients are those of the
    whole head; ``weight`` receives the gradient of its own rows, ``hidden`` the full gradient. A
    :class:`kdlosses.Divergence` supports it, plain and chunked, if the teacher is sharded in the
    same way; a ``RowLoss`` needs whole rows and is refused. Nothing is compiled.

    Not recommended if one process can hold the head and the chunked loss, because every tile of
    rows requires communication between the processes.

    Args:
        group: the processes, by default all; torch.distributed must be initialised.

    Attributes:
        start: the first token of this process.
        total: number of tokens of all processes.
        last: the first token of the last process.

    Raises:
        ValueError: as in :class:`Projected`, or if a process has no rows.
    """

    group: Group = None
    start: int = field(init=False)
    total: int = field(init=False)
    last: int = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = torch.tensor([len(self.weight)], device=self.weight.device)
        world = torch.distributed.get_world_size(self.group)
        counts = [torch.zeros_like(count) for _ in range(world)]
        torch.distributed.all_gather(counts, count, group=self.group)
        sizes = [int(one) for one in counts]
        if min(sizes) < 1:
            raise ValueError("VocabParallel: a process of the group has no rows of the head")
        rank = torch.distributed.get_rank(self.group)
        object.__setattr__(self, "start", sum(sizes[:rank]))
        object.__setattr__(self, "total", sum(sizes))
        object.__setattr__(self, "last", sum(sizes[:-1]))

    @property
    def vocab_size(self) -> int:
        """Number of rows of the whole projection."""
        return self.total

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of this process."""
        return Shard(self.start, self.group)

    def columns(self, vocab_size: int) -> int:
        """How many of the first ``vocab_size`` tokens this process has."""
        return max(0, min(vocab_size - self.start, len(self.weight)))


Source = Logits | Projected


def as_source(value: Tensor | Source, name: str) -> Source:
    """Accept a tensor of logits or a source.

    Raises:
        TypeError: any other type; the message names the argument.
    """
    if isinstance(value, Logits | Projected):
        return value
    if isinstance(value, Tensor):
        return Logits(value)
    raise TypeError(
        f"{name}: expected a tensor of logits or kdlosses.Projected, got {type(value).__name__}"
    )


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """Compute raw logits ``hidden @ weight.T + bias``, outside autograd.

    The product is float32 if the device supports it for 16-bit inputs, to avoid rounding the logits
    to 16 bits.

    Args:
        hidden: ``[n, H]``.
        weight: ``[V, H]``, the same dtype.
        bias: ``[V]`` or None.
        buffer: output buffer ``[>= n, V]``, used if the product has the dtype of the inputs.

    Returns:
        ``[n, V]``.
    """
    if float32_products(hidden):
        raw = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return raw if bias is None else raw.add_(bias)
    out = None if buffer is None else buffer[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)  # rounds once instead of twice


def float32_products(operand: Tensor) -> bool:
    """Whether products of 16-bit operands are available in float32 (CUDA's ``out_dtype``)."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)


def require_float(name: str, tensor: Tensor) -> None:
    """Refuse tensors that are not floating-point.

    Raises:
        TypeError: names the argument.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected floating-point values, got {tensor.dtype}")
