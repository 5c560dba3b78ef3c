"""Compressed teachers: the most likely tokens with a tail bucket, or sampled tokens."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kdlosses.numerics import log_softmax
from kdlosses.sources import Source, as_source, require_float


@dataclass(frozen=True)
class TopK:
    """A teacher's k most likely tokens and one bucket for all others.

    The distributions of teacher and student are compared over k + 1 events. For a loss with the
    trait ``coarse_graining_monotone`` the value is at most the full value, and grows with k until
    they are equal at k = V. Every :class:`Divergence` supports it, and every ``RowLoss`` that
    declares ``supports_top_k``.

    Not recommended if the tail of the teacher matters, because the distribution of the student
    within the bucket is unconstrained.

    Args:
        log_probs: ``[..., k]`` the tokens' log-probabilities, softened by ``temperature``; an entry
            of ``-inf`` is ignored, whatever its index, so rows of unequal length can be padded.
        indices: ``[..., k]`` int64, the tokens, each once.
        tail_log_prob: ``[...]`` the log-probability of all others; ``-inf`` at k = V.
        vocab_size: number of tokens in the vocabulary.
        temperature: temperature of the probabilities; the loss must use the same.

    Raises:
        ValueError: inconsistent shapes. A token that appears twice with mass in a supervised row is
            refused when a loss is evaluated.
        TypeError: tensors of the wrong data type.
    """

    log_probs: Tensor
    indices: Tensor
    tail_log_prob: Tensor
    vocab_size: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_tokens("TopK", self.log_probs, self.indices, self.vocab_size)
        if self.tail_log_prob.shape != self.log_probs.shape[:-1]:
            raise ValueError(
                f"TopK: tail_log_prob has shape {list(self.tail_log_prob.shape)}, expected "
                f"{list(self.log_probs.shape[:-1])}"
            )

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, temperature: float = 1.0) -> Self:
        """Compress logits ``[..., V]``, which must already be cut to the shared vocabulary.

        Raises:
            ValueError: k outside [1, V].
        """
        vocab_size = logits.shape[-1]
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k: must be in [1, {vocab_size}], got {k}")
        log_probs = _log_probs(logits, temperature)
        kept, indices = log_probs.topk(k, dim=-1)
        others = log_probs.scatter(-1, indices, -math.inf)
        return cls(kept, indices, others.logsumexp(-1), vocab_size, temperature)

    @property
    def leading_shape(self) -> torch.Size:
        """The shape without the axis of tokens."""
        return self.log_probs.shape[:-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors, whose first axes are the leading shape."""
        return self.log_probs, self.indices, self.tail_log_prob


@dataclass(frozen=True)
class Sampled:
    """Tokens sampled from a teacher, each with its log-probability.

    A loss ``sum_v f(p_v, q_v)`` is estimated by the mean of ``f(p_v, q_v) / p_v`` over the draws.
    Value and gradient are unbiased for a :class:`Divergence` with ``linear_finish`` and a plain
    sum, if the teacher assigns some mass to every token; other losses are refused.

    Not recommended with few draws for losses that weight by the student (reverse KL): tokens that
    the student overestimates are rarely drawn, and then count ``q / p`` times.

    Args:
        log_probs: ``[..., n]`` the teacher's log-probabilities, softened by ``temperature``.
        indices: ``[..., n]`` int64, the drawn tokens, with repetitions.
        vocab_size: number of tokens in the vocabulary.
        temperature: temperature of the probabilities; the loss must use the same.

    Raises:
        ValueError: inconsistent shapes.
        TypeError: tensors of the wrong data type.
    """

    log_probs: Tensor
    indices: Tensor
    vocab_size: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_tokens("Sampled", self.log_probs, self.indices, self.vocab_size)

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        draws: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Draw from logits ``[..., V]``, which must already be cut to the shared vocabulary.

        Raises:
            ValueError: fewer than one draw.
        """
        if draws < 1:
            raise ValueError(f"draws: must be at least 1, got {draws}")
        log_probs = _log_probs(logits, temperature)
        flat = log_probs.reshape(-1, log_probs.shape[-1])
        indices = torch.multinomial(flat.exp(), draws, replacement=True, generator=generator)
        indices = indices.view(*log_probs.shape[:-1], draws)
        return cls(log_probs.gather(-1, indices), indices, log_probs.shape[-1], temperature)

    @property
    def leading_shape(self) -> torch.Size:
        """The shape without the axis of draws."""
        return self.log_probs.shape[:-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors, whose first axes are the leading shape."""
        return self.log_probs, self.indices


Compressed = TopK | Sampled
TeacherSource = Source | Compressed


def as_teacher(value: Tensor | TeacherSource) -> TeacherSource:
    """Like :func:`as_source`, but also accept a compressed teacher."""
    return value if isinstance(value, TopK | Sampled) else as_source(value, "teacher")


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    require_float("logits", logits)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: must be a positive number, got {temperature}")
    return log_softmax(log_softmax(logits.detach()) / temperature)


def check_once(teacher: TopK, kept: Tensor | None) -> None:
    """Refuse a token that appears twice with mass, because the student's would be counted twice.

    Args:
        teacher: the teacher of all rows.
        kept: indices of the supervised rows in the flattened teacher, or None for all.

    Raises:
        ValueError: names the token and the row.
    """
    k = teacher.indices.shape[-1]
    log_probs, indices = teacher.log_probs.reshape(-1, k), teacher.indices.reshape(-1, k)
    if kept is not None:
        log_probs, indices = log_probs[kept], indices[kept]
    places = -1 - torch.arange(k, device=indices.device)
    ordered = torch.where(log_probs > -math.inf, indices, places).sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        row, place = twice.nonzero()[0].tolist()
        number = row if kept is None else int(kept[row])
        raise ValueError(
            f"teacher: token {int(ordered[row, place])} appears twice with mass in row {number} "
            "of the TopK; keep one entry with the sum of both probabilities"
        )


def _check_tokens(kind: str, log_probs: Tensor, indices: Tensor, vocab_size: int) -> None:
    require_float(f"{kind}: log_probs", log_probs)
    if indices.dtype != torch.int64:
        raise TypeError(f"{kind}: indices: expected int64, got {indices.dtype}")
    if log_probs.shape != indices.shape or log_probs.ndim < 1 or not log_probs.shape[-1]:
        raise ValueError(
            f"{kind}: log_probs and indices must have the same shape [..., k] with k >= 1, got "
            f"{list(log_probs.shape)} and {list(indices.shape)}"
        )
    if indices.numel() and (indices.min() < 0 or indices.max() >= vocab_size):
        raise ValueError(f"{kind}: indices: a token is outside the vocabulary of {vocab_size}")
