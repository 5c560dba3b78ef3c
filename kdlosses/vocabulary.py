"""What reaches across the vocabulary: the softmax, sums, and which token is the label.

A row may hold all tokens, or the part of them that this process has of an output head that is
spread over processes (vocabulary parallel, as in Megatron-LM, arXiv:1909.08053). Everything else in
a loss happens token by token and does not know the difference.
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
    """All tokens are here."""

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities ``[..., V]``; see :func:`kdlosses.numerics.log_softmax`."""
        return log_softmax(logits)

    def sum(self, terms: Tensor) -> Tensor:
        """Over the tokens."""
        return terms.sum(-1)

    def logsumexp(self, terms: Tensor) -> Tensor:
        """Over the tokens."""
        return terms.logsumexp(-1)

    def pick(self, terms: Tensor, tokens: Tensor) -> Tensor:
        """The term of one token ``[...]`` in each row."""
        result: Tensor = _Pick.apply(terms, tokens)  # type: ignore[no-untyped-call]
        return result


@dataclass(frozen=True)
class Shard(Vocabulary):
    """Some tokens are here, the others with the other processes of a group.

    Every process has the same rows and calls the same functions in the same order. Results without
    the axis of tokens are whole on each of them, and so are their gradients.

    Attributes:
        start: the first token that is here.
        group: the processes that have one part each.
    """

    start: int
    group: Group = None

    def log_softmax(self, logits: Tensor) -> Tensor:
        """The part of the log-probabilities that is here."""
        x = logits if logits.dtype == torch.float64 else logits.float()
        z = x - _highest(x, self.group)
        normaliser = _together(z.exp().sum(-1, keepdim=True), self.group)
        return z - copied(normaliser.log(), self.group)

    def sum(self, terms: Tensor) -> Tensor:
        """Over the tokens of all processes."""
        return _together(terms.sum(-1), self.group)

    def logsumexp(self, terms: Tensor) -> Tensor:
        """Over the tokens of all processes."""
        highest = _highest(terms, self.group)
        total = _together((terms - highest).exp().sum(-1), self.group)
        return total.log() + highest.squeeze(-1)

    def pick(self, terms: Tensor, tokens: Tensor) -> Tensor:
        """The term of one token in each row, which one process has."""
        return _together(super().pick(terms, tokens - self.start), self.group)


WHOLE = Vocabulary()


def copied(values: Tensor, group: Group) -> Tensor:
    """Values that every process has and uses for its part: their gradients add up."""
    result: Tensor = _ToEach.apply(values, group)  # type: ignore[no-untyped-call]
    return result


def _together(values: Tensor, group: Group) -> Tensor:
    result: Tensor = _Together.apply(values, group)  # type: ignore[no-untyped-call]
    return result


def _highest(values: Tensor, group: Group) -> Tensor:
    """The largest entry of each row, of all processes, as a number without gradient."""
    highest = values.detach().amax(-1, keepdim=True)
    result: Tensor = _Highest.apply(highest, group)  # type: ignore[no-untyped-call]
    return result


class _Pick(torch.autograd.Function):
    """A gather, 0 outside of the row. Its gradient is a mask, which fuses with other elementwise
    work as the gather's own, a scatter, does not; and a masked sum in its place would be one more
    reduction, beside which the compiler fuses no other."""

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


class _Together(torch.autograd.Function):
    """Adds up what the processes have; the sum is one value, so its gradient is that of each."""

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
    """Hands one value to the parts of all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(values: Tensor, group: Group) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _together(gradient, ctx.group), None
