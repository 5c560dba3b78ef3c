"""Hidden states, heads and labels, the same in every worker."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdrun.bench.cases import Point, Settings

IGNORED = -100


@dataclass(frozen=True)
class Inputs:
    """The inputs of a step.

    Attributes:
        hidden: ``[tokens, student width]``, receives a gradient.
        weight: ``[vocab, student width]``, receives a gradient.
        teacher_hidden: ``[tokens, teacher width]``.
        teacher_weight: ``[vocab, teacher width]``.
        labels: ``[tokens]``, a quarter of them ignored.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor

    def last(self, rows: int) -> Inputs:
        """The last rows, which are supervised, with the same heads."""
        return replace(
            self,
            hidden=self.hidden.detach()[-rows:].requires_grad_(),
            teacher_hidden=self.teacher_hidden[-rows:],
            labels=self.labels[-rows:],
        )


def make_inputs(settings: Settings, point: Point) -> Inputs:
    """Create random inputs from a fixed seed; logits have a standard deviation of about 1."""
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, settings.dtype), "device": settings.device}

    def states(width: int) -> Tensor:
        return torch.randn(point.tokens, width, **options)

    def head(width: int) -> Tensor:
        return torch.randn(point.vocab, width, **options).mul_(width**-0.5)

    labels = torch.randint(point.vocab, (point.tokens,), device=settings.device)
    labels[: point.masked] = IGNORED
    return Inputs(
        states(settings.student_width).requires_grad_(),
        head(settings.student_width).requires_grad_(),
        states(settings.teacher_width),
        head(settings.teacher_width),
        labels,
    )
