"""The evaluation of a loss on hidden states: pairs of layers, selected tokens, chunks, projectors.

A chunk's gradient is computed with its value, so that of all intermediate tensors (copies in
float32, projected states, relations) only those of one chunk exist at a time, whatever the number
of pairs. What remains until the backward pass is the gradient of each paired layer's states at the
selected tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kdlosses.hidden_loss import FeatureLoss, HiddenLoss, RelationLoss
from kdlosses.layer_map import UNIFORM, layer_pairs


@dataclass(frozen=True)
class Hidden:
    """The shape of a model's hidden states.

    Attributes:
        layers: number of layers.
        width: width of their states.
    """

    layers: int
    width: int


class FeatureTerm(nn.Module):
    """``weight * mean over pairs of layers of (sum over tokens of the loss) / num_tokens``.

    Where the widths differ, each pair has a linear projector without bias from the student's width
    to the teacher's, in float32; its weights are the only parameters of this module.

    Args:
        loss: the loss on hidden states.
        teacher: the teacher's layers and width.
        student: the student's layers and width.
        layers: the pairs, as :func:`kdlosses.layer_pairs` reads them.
        weight: factor above 0.
        tokens: which tokens the caller selects, ``"supervised"`` or ``"all"``; only recorded here.
        seed: of the projectors' initial weights.
        chunk_size: tokens evaluated at a time; None evaluates all at once, with plain autograd,
            which also supports a second derivative.

    Attributes:
        pairs: ``(teacher layer, student layer)``, counted from 1.

    Raises:
        ValueError: layers that a model does not have, a weight that is not above 0, or a chunk size
            below 1.
    """

    def __init__(
        self,
        loss: HiddenLoss,
        teacher: Hidden,
        student: Hidden,
        *,
        layers: str = UNIFORM,
        weight: float = 1.0,
        tokens: Literal["supervised", "all"] = "supervised",
        seed: int = 0,
        chunk_size: int | None = 1024,
    ) -> None:
        super().__init__()
        if not weight > 0:
            raise ValueError(f"weight: must be above 0, got {weight}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")
        self.loss, self.weight, self.tokens = loss, float(weight), tokens
        self.pairs = layer_pairs(layers, teacher.layers, student.layers)
        self._chunk_size = chunk_size
        widths = (student.width, teacher.width)
        projected = loss.equal_widths and teacher.width != student.width
        self.projectors = nn.ParameterList(
            _initial(seed, number, *widths) for number in range(len(self.pairs) if projected else 0)
        )

    def forward(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        num_tokens: Tensor | int,
        sequences: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the term of a batch from the states at its selected tokens.

        Args:
            teacher: for each pair ``[n, H]``; receives no gradient.
            student: for each pair ``[n, G]``.
            num_tokens: supervised tokens of the optimiser step, over all micro-batches and
                processes.
            sequences: ``[n]`` int64, the sequence of each token; the tokens of a sequence are
                adjacent. Required for a :class:`RelationLoss`.

        Returns:
            The weighted term, which has a gradient, and the same without weight or gradient.

        Raises:
            ValueError: a wrong number of tensors, sides of different length, or no sequences for a
                relation.
        """
        sides = [*teacher, *student]
        if not len(teacher) == len(student) == len(self.pairs):
            raise ValueError(
                f"expected states of {len(self.pairs)} pairs of layers, got {len(teacher)} of the "
                f"teacher and {len(student)} of the student"
            )
        if len({len(side) for side in sides}) > 1:
            raise ValueError(
                f"states: teacher and student have {len(teacher[0])} and {len(student[0])} tokens"
            )
        parts = self._parts(len(student[0]), sequences)
        scale = 1.0 / (len(self.pairs) * _at_least_one(num_tokens))
        total = sum(
            (
                self._pair(number, teacher[number].detach(), student[number], parts)
                for number in range(len(self.pairs))
            ),
            start=student[0].new_zeros((), dtype=_exact(student[0])),
        )
        mean = total * scale
        return self.weight * mean, mean.detach()

    def _parts(self, count: int, sequences: Tensor | None) -> list[slice]:
        """The pieces that are evaluated at once: chunks of tokens, or sequences."""
        if isinstance(self.loss, RelationLoss):
            if sequences is None:
                raise ValueError("sequences: required by a relation between tokens")
            _, lengths = torch.unique_consecutive(sequences, return_counts=True)
            ends = lengths.cumsum(0).tolist()
            return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        size = max(1, count) if self._chunk_size is None else self._chunk_size
        return [slice(start, start + size) for start in range(0, count, size)]

    def _pair(self, number: int, teacher: Tensor, student: Tensor, parts: list[slice]) -> Tensor:
        """The sum over the tokens of a pair of layers."""
        weights = [self.projectors[number]] if len(self.projectors) else []
        with torch.autocast(student.device.type, enabled=False):
            if not parts:  # connected to the graph, with gradients of zero
                inputs = [student, *weights]
                return _linear(inputs, [_gradient_like(each) for each in inputs])
            if self._chunk_size is None:
                values = [self._values(teacher[p], student[p], weights) for p in parts]
                return torch.stack([value.sum() for value in values]).sum()
            return self._with_gradients(teacher, student, weights, parts)

    def _values(self, teacher: Tensor, student: Tensor, weights: Sequence[Tensor]) -> Tensor:
        kind = _exact(student)
        teacher, student = teacher.to(kind), student.to(kind)
        if weights:
            student = student @ weights[0].to(kind).mT
        if isinstance(self.loss, RelationLoss):
            return self.loss.sequence(teacher, student)
        assert isinstance(self.loss, FeatureLoss)
        return self.loss.row(teacher, student)

    def _with_gradients(
        self, teacher: Tensor, student: Tensor, weights: Sequence[Tensor], parts: list[slice]
    ) -> Tensor:
        """The sum over the tokens, part by part, each with its gradient.

        The gradients enter the graph through a linear function of the inputs, whose own value is
        subtracted again.
        """
        inputs = [student, *weights]
        wanted = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
        total = student.new_zeros((), dtype=_exact(student))
        gradients = [_gradient_like(each) for each in inputs] if wanted else []
        leaves = [weight.detach().requires_grad_(wanted) for weight in weights]
        for part in parts:
            with torch.set_grad_enabled(wanted):
                states = student[part].detach().requires_grad_(wanted)
                value = self._values(teacher[part], states, leaves).sum()
            total += value.detach()
            if wanted:
                of_states, *of_weights = torch.autograd.grad(value, [states, *leaves])
                gradients[0][part] = of_states
                for summed, one in zip(gradients[1:], of_weights, strict=True):
                    summed += one
        return total + _linear(inputs, gradients) if wanted else total


def _linear(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A function of the inputs that is 0 and has the given gradients."""
    value = torch.stack(
        [
            (given * gradient).sum(dtype=_exact(given))
            for given, gradient in zip(inputs, gradients, strict=True)
        ]
    ).sum()
    return value - value.detach()


def _gradient_like(given: Tensor) -> Tensor:
    """Room for a gradient; in float16, small ones would be lost before the loss is scaled up."""
    kind = torch.float32 if given.dtype == torch.float16 else given.dtype
    return torch.zeros_like(given, dtype=kind, requires_grad=False)


def _exact(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _at_least_one(num_tokens: Tensor | int) -> Tensor | int:
    return num_tokens.clamp_min(1) if isinstance(num_tokens, Tensor) else max(1, num_tokens)


def _initial(seed: int, number: int, student: int, teacher: int) -> nn.Parameter:
    """Weights with the variance that keeps a state's mean square, the same on every device."""
    generator = torch.Generator().manual_seed(seed * 1000 + number)
    drawn = torch.randn(teacher, student, generator=generator, device="cpu", dtype=torch.float32)
    return nn.Parameter(drawn.div_(student**0.5))
