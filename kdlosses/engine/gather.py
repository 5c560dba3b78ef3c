"""The supervised rows of a source, and the gradients of its tensors."""

import torch
import torch.distributed
from torch import Tensor

from kdlosses.compressed import Compressed
from kdlosses.sources import Logits, Projected, Source, VocabParallel, float32_products, project


class Rows:
    """Raw logits of the supervised rows of a source, by chunk.

    Args:
        source: source of the logits.
        kept: indices of the supervised rows in the flattened source, or None for all.
        vocab_size: the logits are cut to this many entries.
        chunk_rows: the largest chunk that will be requested.
    """

    def __init__(self, source: Source, kept: Tensor | None, vocab_size: int, chunk_rows: int):
        self._values = _flat(source)
        self._bias: Tensor | None = None
        self._buffer: Tensor | None = None
        self.kept = kept
        self.vocab_size = vocab_size
        self.weight: Tensor | None = None
        if isinstance(source, Projected):
            dtype = self._values.dtype
            self.weight = source.weight.detach()[:vocab_size].to(dtype)
            if source.bias is not None:
                self._bias = source.bias.detach()[:vocab_size].to(dtype)
            if not float32_products(self._values):
                self._buffer = self._values.new_empty(chunk_rows, vocab_size)

    @property
    def owns_raw(self) -> bool:
        """Whether the tensors that :meth:`raw` returns may be overwritten."""
        return self.weight is not None

    def inputs(self, span: slice) -> Tensor:
        """The rows ``span`` of the logits or hidden states, ``[n, width]``."""
        if self.kept is None:
            return self._values[span]
        return self._values.index_select(0, self.kept[span])

    def raw(self, inputs: Tensor) -> Tensor:
        """Raw logits ``[n, vocab_size]`` of gathered inputs; valid until the next call."""
        if self.weight is None:
            return inputs[:, : self.vocab_size]
        return project(inputs, self.weight, self._bias, self._buffer)

    def tensors(self, span: slice) -> tuple[Tensor, ...]:
        """The raw logits of the rows ``span``, valid until the next call."""
        return (self.raw(self.inputs(span)),)


class StoredRows:
    """The stored tensors of a compressed teacher for the supervised rows.

    Args:
        source: the teacher.
        kept: indices of the supervised rows in the flattened source, or None for all.
    """

    def __init__(self, source: Compressed, kept: Tensor | None):
        leading = len(source.leading_shape)
        self._tensors = tuple(
            tensor.detach().reshape(-1, *tensor.shape[leading:]) for tensor in source.tensors
        )
        self._kept = kept

    def tensors(self, span: slice) -> tuple[Tensor, ...]:
        """The rows ``span`` of each tensor."""
        if self._kept is None:
            return tuple(tensor[span] for tensor in self._tensors)
        return tuple(tensor.index_select(0, self._kept[span]) for tensor in self._tensors)


class Gradients:
    """Accumulates the gradients of a student source over chunks.

    The head's gradient accumulates in float32 and is not allocated for a frozen head.

    Args:
        source: the student.
        needed: for each of ``source.tensors``, whether it needs a gradient.
        rows: the supervised rows of the student.
    """

    def __init__(self, source: Source, needed: tuple[bool, ...], rows: Rows):
        self._source = source
        self._rows = rows
        self._values = torch.zeros_like(_flat(source)) if needed[0] else None
        self._head: Tensor | None = None
        self._bias: Tensor | None = None
        if isinstance(source, Projected):
            if needed[1]:
                self._head = _accumulator(source.weight)
            if source.bias is not None and needed[2]:
                self._bias = _accumulator(source.bias)

    def add(self, span: slice, inputs: Tensor, gradient: Tensor) -> None:
        """Add one chunk: ``inputs`` as gathered, ``gradient`` ``[n, V]`` of its raw logits."""
        gradient = gradient.to(inputs.dtype)
        weight, vocab_size = self._rows.weight, self._rows.vocab_size
        if self._values is not None:
            self._put(span, gradient if weight is None else torch.mm(gradient, weight))
        if self._head is not None:
            head = self._head[:vocab_size]
            if head.dtype == gradient.dtype:
                head.addmm_(gradient.t(), inputs)
            elif float32_products(gradient):
                head.add_(torch.mm(gradient.t(), inputs, out_dtype=torch.float32))
            else:
                head.add_(torch.mm(gradient.t(), inputs))
        if self._bias is not None:
            self._bias[:vocab_size] += gradient.sum(0, dtype=self._bias.dtype)

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients of ``source.tensors``; None for tensors that need none."""
        first = self._source.tensors[0]
        values = None if self._values is None else self._values.view(first.shape)
        if values is not None and isinstance(self._source, VocabParallel):
            torch.distributed.all_reduce(values, group=self._source.group)
        if isinstance(self._source, Logits):
            return (values,)
        head = None if self._head is None else self._head.to(self._source.weight.dtype)
        if self._source.bias is None:
            return values, head
        bias = None if self._bias is None else self._bias.to(self._source.bias.dtype)
        return values, head, bias

    def _put(self, span: slice, rows: Tensor) -> None:
        assert self._values is not None
        target = self._values[:, : rows.shape[1]]
        kept = self._rows.kept
        if kept is None:
            target[span] = rows
        else:
            target[kept[span]] = rows


def _flat(source: Source) -> Tensor:
    return source.tensors[0].detach().reshape(-1, source.width)


def _accumulator(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
