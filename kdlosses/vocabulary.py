"""Operations across the vocabulary: softmax, sums, and the selection of the label.

A row may contain all tokens, or the shard of this process if the output head is sharded across
processes (vocabulary parallel, as in Megatron-LM, arXiv:1909.08053). All other operations of a loss
are elementwise and do not depend on the sharding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from kdlosses.numerics import log_softmax

Group = Any
"""A ``torch.distributed.ProcessGroup``, or None for all processes."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that is entirely on this process."""

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities ``[..., V]``; see :func:`kdlosses.numerics.log_softmax`."""
        return log_softmax(logits)

    def sum(self, terms: Tensor) -> Tensor:
        """Reduce over the tokens."""
        return terms.sum(-1)

    def logsumexp(self, terms: Tensor) -> Tensor:
        """Reduce over the tokens."""
        return terms.logsumexp(-1)

    def whole(self, terms: Tensor) -> Tensor:
        """The terms of all tokens, without gradient."""
        return terms.detach()

    def pick(self, terms: Tensor, tokens: Tensor) -> Tensor:
        """Select the term of one token in each row, ``[...]``."""
        result: Tensor = _Pick.apply(terms, tokens)  # type: ignore[no-untyped-call]
        return result


@dataclass(frozen=True)
class Shard(Vocabulary):
    """A vocabulary sharded across the processes of a group.

    Every process has the same rows and calls the same functions in the same order. Results without
    the token axis, and their gradients, are complete on every process.

    Attributes:
        start: the first token of this process.
        group: the processes, each with one shard.
    """

    start: int
    group: Group = None

    def log_softmax(self, logits: Tensor) -> Tensor:
        """The shard of the log-probabilities of this process."""
        x = logits if logits.dtype == torch.float64 else logits.float()
        z = x - _highest(x, self.group)
        normaliser = _together(z.exp().sum(-1, keepdim=True), self.group)
        return z - copied(normaliser.log(), self.group)

    def sum(self, terms: Tensor) -> Tensor:
        """Reduce over the tokens of all processes."""
        return _together(terms.sum(-1), self.group)

    def logsumexp(self, terms: Tensor) -> Tensor:
        """Reduce over the tokens of all processes."""
        highest = _highest(terms, self.group)
        total = _together((terms - highest).exp().sum(-1), self.group)
        return total.log() + highest.squeeze(-1)

    def whole(self, terms: Tensor) -> Tensor:
        """The terms of the tokens of all processes, without gradient."""
        gathered: Tensor = _Whole.apply(terms.detach(), self)  # type: ignore[no-untyped-call]
        return gathered

    def pick(self, terms: Tensor, tokens: Tensor) -> Tensor:
        """Select the term of one token in each row, from the process that has it."""
        return _together(super().pick(terms, tokens - self.start), self.group)


WHOLE = Vocabulary()


def copied(values: Tensor, group: Group) -> Tensor:
    """Values that every process uses for its shard; their gradients are summed."""
    result: Tensor = _ToEach.apply(values, group)  # type: ignore[no-untyped-call]
    return result


def _together(values: Tensor, group: Group) -> Tensor:
    result: Tensor = _Together.apply(values, group)  # type: ignore[no-untyped-call]
    return result


def _highest(values: Tensor, group: Group) -> Tensor:
    """The largest entry of each row over all processes, without gradient."""
    highest = values.detach().amax(-1, keepdim=True)
    result: Tensor = _Highest.apply(highest, group)  # type: ignore[no-untyped-call]
    return result


class _Pick(torch.autograd.Function):
    """A gather that gives 0 outside the row.

    Its gradient is a mask, which can be fused with other elementwise operations, unlike the scatter
    of a plain gather. A masked sum would be a further reduction, which the compiler does not fuse.
    """

    @staticmethod
    def forward(terms: Tensor, tokens: Tensor) -> Tensor:
        width = terms.shape[-1]
        found = terms.gather(-1, tokens.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1)
        return torch.where((tokens >= 0) & (tokens < width), found, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        terms, tokens = inputs
        ctx.save_for_backward(tokens)
        ctx.width = terms.shape[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        here = torch.arange(ctx.width, device=tokens.device) == tokens.unsqueeze(-1)
        return torch.where(here, gradient.unsqueeze(-1), 0.0), None


class _Highest(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, group: Group) -> Tensor:
        result = values.clone()
        torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX, group)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return None, None


class _Whole(torch.autograd.Function):
    """Shards side by side; summed with zeros, since their widths may differ."""

    @staticmethod
    def forward(terms: Tensor, shard: Shard) -> Tensor:
        stop = shard.start + terms.shape[-1]
        width = torch.tensor(stop, device=terms.device)
        torch.distributed.all_reduce(width, torch.distributed.ReduceOp.MAX, shard.group)
        full = terms.new_zeros(*terms.shape[:-1], int(width))
        full[..., shard.start : stop] = terms
        torch.distributed.all_reduce(full, group=shard.group)
        return full

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class _Together(torch.autograd.Function):
    """Sum over processes; each summand receives the gradient of the sum."""

    @staticmethod
    def forward(values: Tensor, group: Group) -> Tensor:
        result = values.clone()
        torch.distributed.all_reduce(result, group=group)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ToEach(torch.autograd.Function):
    """Share a value with the shards of all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(values: Tensor, group: Group) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _together(gradient, ctx.group), None
