"""Align the rows of teacher and student: over the vocabulary, over buckets, or over draws."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlosses.compressed import Sampled, TeacherSource, TopK
from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.numerics import LOG_ZERO, finite_log_probs
from kdlosses.sources import IDENTITY, Postprocess
from kdlosses.token_weight import TokenWeight
from kdlosses.vocabulary import WHOLE, Vocabulary


@dataclass(frozen=True)
class Aligned:
    """Two distributions over the same events.

    Attributes:
        teacher: ``[n, m]`` finite log-probabilities.
        student: the same for the student.
        weights: factor of each term, ``[n, m]``, or None for 1.
    """

    teacher: Tensor
    student: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class Whole:
    """The teacher's raw logits ``[n, V]``.

    Attributes:
        post: post-processing of the teacher's raw logits.
        vocabulary: the tokens of the logits.
    """

    post: Postprocess
    vocabulary: Vocabulary = WHOLE

    def align(
        self, tensors: tuple[Tensor, ...], student: Tensor, temperature: Tensor | None
    ) -> Aligned:
        """Align over tokens.

        Args:
            tensors: stored tensors of the teacher.
            student: ``[n, V]`` softened finite log-probabilities.
            temperature: 0-d, or None for 1.
        """
        logits = self.post(tensors[0])
        if temperature is not None:
            logits = logits / temperature
        return Aligned(finite_log_probs(self.vocabulary.log_softmax(logits)), student)


@dataclass(frozen=True)
class Buckets:
    """The k most likely tokens and all others together; see :class:`kdlosses.TopK`."""

    def align(
        self, tensors: tuple[Tensor, ...], student: Tensor, temperature: Tensor | None
    ) -> Aligned:
        """Align over k tokens and the rest; arguments as in :meth:`Whole.align`."""
        log_probs, indices, tail = tensors
        teacher = torch.cat([log_probs, tail.unsqueeze(-1)], -1).to(student.dtype)
        # An entry of -inf is padding of rows of unequal length: its event has no mass on either
        # side, and its token stays in the rest. Its index is set to the row's most likely token,
        # which is excluded from the rest in any case.
        present = log_probs > -torch.inf
        likeliest = indices.gather(-1, log_probs.argmax(-1, keepdim=True))
        at = torch.where(present, indices, likeliest)
        mass = student.gather(-1, at)
        taken = torch.where(present.any(-1, keepdim=True), LOG_ZERO, mass)
        # Summed over the rest, since 1 minus the k tokens would cancel if little mass is left.
        others = student.scatter(-1, at, taken).logsumexp(-1, keepdim=True)
        chosen = torch.cat([torch.where(present, mass, LOG_ZERO), others], -1)
        return Aligned(finite_log_probs(teacher), finite_log_probs(chosen))


@dataclass(frozen=True)
class Draws:
    """Sampled tokens; see :class:`kdlosses.Sampled`."""

    def align(
        self, tensors: tuple[Tensor, ...], student: Tensor, temperature: Tensor | None
    ) -> Aligned:
        """Align over draws, weighted by ``1 / (n p)``; arguments as in :meth:`Whole.align`."""
        log_probs, indices = tensors
        teacher = log_probs.to(student.dtype)
        weights = (-teacher).exp() / indices.shape[-1]
        return Aligned(teacher, student.gather(-1, indices), weights)


View = Whole | Buckets | Draws
LOGITS = Whole(IDENTITY)


def view_of(source: TeacherSource) -> View:
    """The view that reads the rows of a teacher."""
    if isinstance(source, TopK):
        return Buckets()
    if isinstance(source, Sampled):
        return Draws()
    return Whole(source.post, source.vocabulary)


def weight_refusal(weight: TokenWeight, source: TeacherSource, softened: bool) -> str | None:
    """Why a token weight does not support a teacher; None if it does."""
    name = type(weight).__name__
    if isinstance(source, Sampled):
        return f"the token weight {name} needs the teacher's distribution, not draws from it"
    if not isinstance(source, TopK):
        return None
    if not weight.supports_top_k:
        return (
            f"the token weight {name} needs the teacher's full distribution (it does not declare "
            "supports_top_k)"
        )
    if softened:
        return (
            "a token weight sees distributions at temperature 1, which a teacher that was stored "
            "at another temperature does not have; use temperature 1"
        )
    return None


def refusal(loss: Loss, source: TeacherSource, temperature: float) -> str | None:
    """Why a loss at a temperature does not support a teacher; None if it does."""
    if not isinstance(source, TopK | Sampled):
        return None
    if source.temperature != temperature:
        return (
            f"its log-probabilities were stored at temperature {source.temperature:g}, but the "
            f"loss uses {temperature:g}; store them again at that temperature"
        )
    name = type(loss).__name__
    if isinstance(source, TopK):
        if isinstance(loss, RowLoss) and not loss.supports_top_k:
            return (
                f"{name} needs the teacher's full distribution (it does not declare supports_top_k)"
            )
        return None
    if not isinstance(loss, Divergence) or not loss.linear_finish or loss.reduction != "sum":
        return (
            f"{name} is not a plain sum over the vocabulary with a linear finish, so an "
            "estimate from draws would be biased"
        )
    return None
