"""What a training loop calls: a loss as a module, and its mix with cross-entropy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlosses.batch import Batch, Denominator
from kdlosses.divergence import Loss, RowLoss
from kdlosses.engine import (
    Chunking,
    Problem,
    Program,
    evaluate,
    refusal,
    silenced,
    view_of,
)
from kdlosses.schedules import Schedule
from kdlosses.sources import Source, TeacherSource, VocabParallel
from kdlosses.terms import TEMPERATURE, MovingTerms, Term


class TokenLoss(nn.Module):
    """A distillation loss over the supervised tokens of a batch. Made by :func:`get_loss`.

    The value is ``sum_k v_k T ** power_k sum_i w_i D_k(p_i, q_i) / num_tokens`` over the rows ``i``
    whose label is not ignored and the terms ``k`` of a weighted sum (mostly one, with weight 1),
    with ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``.

    Args:
        loss: the divergence or row loss, or the terms of a weighted sum.
        chunking: None for the plain evaluation by autograd on full logits.
        temperature: T > 0, softens both sides.
        temperature_scaling: whether each term is multiplied by ``T ** temperature_power``
            (Hinton et al. 2015); TRL, Liger and DistiLLM do not.
        ignore_index: label of the positions that are left out.
        vocab_size: both sides are cut to this many entries before the softmax; by default to the
            smaller of the two heads.
        match_curvature: divide each term by its curvature, so that near equality it is as strong
            as KL and one ``kd_ratio`` means the same for every loss.
        schedules: of ``temperature``, of fields (``"alpha"``), or of fields of one term of a sum
            (``"reverse_kl.alpha"``). They move with :meth:`advance`.

    Raises:
        ValueError: a temperature or vocabulary size that is not positive, ``match_curvature``
            for a loss that states no curvature, terms or schedules that have no meaning.
    """

    def __init__(
        self,
        loss: Loss | Sequence[Term],
        *,
        chunking: Chunking | None = None,
        temperature: float = 1.0,
        temperature_scaling: bool = True,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        match_curvature: bool = False,
        schedules: Mapping[str, Schedule] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        of_temperature = schedules.get(TEMPERATURE)
        for value in of_temperature.extremes if of_temperature else (temperature,):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"temperature: must be a positive number, got {value}")
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"vocab_size: must be at least 1, got {vocab_size}")
        terms = (Term(loss, 1.0, type(loss).__name__),) if isinstance(loss, Loss) else tuple(loss)
        self._moving = MovingTerms(
            terms, {key: value for key, value in schedules.items() if key != TEMPERATURE}
        )
        self._temperature_schedule = of_temperature
        self.chunking = chunking
        self.temperature = of_temperature(0.0) if of_temperature else temperature
        self.temperature_scaling = temperature_scaling
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.match_curvature = match_curvature
        if match_curvature:
            for index, term in enumerate(terms):
                for curvature in self._moving.curvatures(index):
                    _check_curvature(term, curvature)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The weighted losses that are summed; mostly one."""
        return self._moving.terms

    @property
    def loss(self) -> Loss:
        """The one loss.

        Raises:
            ValueError: a sum of several; see :attr:`terms`.
        """
        if len(self.terms) > 1:
            names = ", ".join(term.name for term in self.terms)
            raise ValueError(f"a sum has no single loss; name one of {names}")
        return self.terms[0].loss

    @property
    def progress(self) -> float:
        """The progress that schedules stand at."""
        return self._moving.progress

    @property
    def stateful(self) -> bool:
        """Whether :meth:`advance` needs the values of the terms."""
        return self._moving.stateful

    @property
    def moving_values(self) -> dict[str, float]:
        """The present values of what is scheduled and of state variables, by name."""
        temperature = {TEMPERATURE: self.temperature} if self._temperature_schedule else {}
        return {**temperature, **self._moving.named_values}

    def advance(self, progress: float, term_values: Sequence[float] | None = None) -> None:
        """Move schedules and state on, once after each optimiser step.

        Args:
            progress: the share of the training that is done, in [0, 1].
            term_values: for each term its mean over the supervised tokens of the step, of all
                micro-batches and ranks (:attr:`KDOutput.kd_terms`); only stateful losses need it.

        Raises:
            ValueError: a progress outside [0, 1], or values missing that a state needs.
        """
        if self.stateful and term_values is None:
            raise ValueError(
                "term_values: a loss carries state and needs the mean of each term over the step"
            )
        self._move(progress, term_values)

    def get_extra_state(self) -> dict[str, Any]:
        """Progress and state variables: numbers, part of ``state_dict``."""
        return self._moving.state()

    def set_extra_state(self, state: Any) -> None:
        """Take back what :meth:`get_extra_state` gave."""
        self._moving.restore(state)
        self._move_temperature()

    def extra_repr(self) -> str:
        """Shows the losses and how they are evaluated."""
        how = "plain" if self.chunking is None else "chunked"
        sum_ = " + ".join(
            repr(term.loss) if term.weight == 1 else f"{term.weight:g} {term.loss!r}"
            for term in self.terms
        )
        return f"{sum_}, {how}, temperature={self.temperature}"

    def forward(
        self,
        student: Tensor | Source,
        teacher: Tensor | TeacherSource,
        labels: Tensor,
        num_tokens: Denominator | None = None,
        *,
        token_weights: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student: logits ``[..., V]`` or :class:`Projected`.
            teacher: likewise, or compressed (:class:`TopK`, :class:`Sampled`); it never receives a
                gradient.
            labels: ``[...]`` aligned with the logits: ``labels[..., i]`` is the target of
                ``logits[..., i, :]``. Positions with ``ignore_index`` are left out.
            num_tokens: the denominator; by default the supervised tokens of this call. Give the
                number over all micro-batches and ranks when a step is split.
            token_weights: ``[...]`` weight of each position's value.
            reduction: ``"mean"`` or ``"none"``.

        Returns:
            0-d, or with ``reduction="none"`` the values ``[...]``, 0 where ignored (``num_tokens``
            must not be given then). With no supervised token the value is 0 with zero gradients.

        Raises:
            ValueError: on shapes that do not fit together, labels outside the vocabulary, or a
                compressed teacher that the loss or its temperature has no meaning with.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
        if teacher is None:
            raise TypeError("teacher: expected logits or kdlosses.Projected, got NoneType")
        per_row = reduction == "none"
        if per_row and num_tokens is not None:
            raise ValueError("num_tokens: has no meaning with reduction='none'")
        batch = self._batch(student, teacher, labels)
        weight = batch.weights(token_weights)
        divisor = 1.0 if per_row else batch.denominator(num_tokens)
        factors = self._weighted_factors(batch)
        total, kd, _ = evaluate(
            self._problem(batch),
            weight.unsqueeze(-1) * (factors / divisor),
            torch.zeros_like(weight),
            self.chunking,
            per_row,
        )
        if not per_row:
            return total
        weight = weight.unsqueeze(-1)
        return batch.rows.spread((silenced(kd, weight) * (factors * weight)).sum(-1))

    def _batch(
        self, student: Tensor | Source, teacher: Tensor | TeacherSource | None, labels: Tensor
    ) -> Batch:
        return Batch.of(student, teacher, labels, self.ignore_index, self.vocab_size)

    def _problem(self, batch: Batch, with_teacher: bool = True) -> Problem:
        """What the engine is to evaluate; without the teacher, cross-entropy alone."""
        if batch.teacher is None or not with_teacher:
            program = Program(student_post=batch.student.post, vocabulary=batch.student.vocabulary)
            return Problem(program, batch.student, None, batch.rows, (), batch.vocab_size)
        for term in self.terms:
            reason = refusal(term.loss, batch.teacher, self.temperature)
            if reason is not None:
                raise ValueError(f"teacher: {reason}")
            if isinstance(batch.student, VocabParallel) and isinstance(term.loss, RowLoss):
                name = type(term.loss).__name__
                raise ValueError(f"student: {name} needs whole rows, and its head is spread")
        program = Program(
            losses=tuple(term.loss for term in self.terms),
            bound=self._moving.bound,
            student_post=batch.student.post,
            view=view_of(batch.teacher),
            softened=self.temperature != 1.0 or self._temperature_schedule is not None,
            vocabulary=batch.student.vocabulary,
        )
        moving = [value for values in self._moving.values for value in values.values()]
        scalars = tuple(batch.scalar(value) for value in (self.temperature, *moving))
        return Problem(program, batch.student, batch.teacher, batch.rows, scalars, batch.vocab_size)

    def _factors(self, batch: Batch) -> Tensor:
        """What makes the raw value of each term its reported value, ``[k]``."""
        factors = []
        for index, term in enumerate(self.terms):
            power = term.loss.temperature_power if self.temperature_scaling else 0
            factor = self.temperature**power
            if self.match_curvature:
                factor /= _check_curvature(term, self._moving.curvature(index))
            factors.append(factor)
        device = batch.student.tensors[0].device
        return torch.tensor(factors, dtype=batch.dtype, device=device)

    def _weighted_factors(self, batch: Batch) -> Tensor:
        weights = torch.tensor([term.weight for term in self.terms], dtype=batch.dtype)
        factors = self._factors(batch)
        return factors * weights.to(factors.device)

    def _move(self, progress: float, term_values: Sequence[float] | None) -> None:
        self._moving.advance(progress, term_values)
        self._move_temperature()

    def _move_temperature(self) -> None:
        if self._temperature_schedule is not None:
            self.temperature = self._temperature_schedule(self._moving.progress)


def _check_curvature(term: Term, curvature: float | None) -> float:
    if not curvature:
        raise ValueError(
            f"match_curvature: {term.name} has no curvature to match (it states {curvature})"
        )
    return curvature


@dataclass(frozen=True)
class KDOutput:
    """What an objective gives.

    Attributes:
        loss: 0-d, the only member with a gradient.
        class_loss: 0-d cross-entropy per supervised token.
        kd_loss: 0-d KD term per supervised token (temperature factor included), None where no
            teacher was given.
        kd_terms: ``[k]`` the terms of a weighted sum, before their weights; for one loss of weight
            1 it holds ``kd_loss``. None where no teacher was given.
        num_tokens: 0-d int64, supervised tokens of this call.
    """

    loss: Tensor
    class_loss: Tensor
    kd_loss: Tensor | None
    kd_terms: Tensor | None
    num_tokens: Tensor


class KDObjective(nn.Module):
    """``(1 - kd_ratio) * CE + kd_ratio * KD`` over the supervised tokens of a batch.

    CE and KD share the student's projection. CE stays at temperature 1.

    Args:
        loss: from :func:`kdlosses.get_loss`.
        kd_ratio: weight of the KD term in [0, 1], or its schedule; 0 never evaluates the teacher.
            A number may be changed between steps.

    Raises:
        ValueError: ``kd_ratio`` outside [0, 1].
    """

    def __init__(self, loss: TokenLoss, kd_ratio: float | Schedule = 0.5) -> None:
        super().__init__()
        self.loss = loss
        self._schedule = None if isinstance(kd_ratio, float | int) else kd_ratio
        if self._schedule is not None:
            for value in self._schedule.extremes:
                self.kd_ratio = value  # checks it
            kd_ratio = self._schedule(0.0)
        self.kd_ratio = kd_ratio  # type: ignore[assignment]

    @property
    def kd_ratio(self) -> float:
        """Weight of the KD term."""
        return self._kd_ratio

    @kd_ratio.setter
    def kd_ratio(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise ValueError(f"kd_ratio: must lie in [0, 1], got {value}")
        self._kd_ratio = float(value)

    @property
    def needs_teacher(self) -> bool:
        """Whether ``kd_ratio`` is, or will come, above 0."""
        return max(self._schedule.extremes if self._schedule else (self.kd_ratio,)) > 0

    @property
    def moving_values(self) -> dict[str, float]:
        """The present values of what is scheduled and of state variables, by name."""
        ratio = {"kd_ratio": self.kd_ratio} if self._schedule else {}
        return {**ratio, **self.loss.moving_values}

    def advance(self, progress: float, term_values: Sequence[float] | None = None) -> None:
        """Move schedules and state on; see :meth:`TokenLoss.advance`.

        A step at ``kd_ratio`` 0 has no values of the terms and leaves states as they are.
        """
        if self.kd_ratio == 0:
            self.move(progress)
            return
        self.loss.advance(progress, term_values)
        self._move_ratio(progress)

    def move(self, progress: float) -> None:
        """Move schedules alone, as for a step that was left out or a training that got longer.

        Args:
            progress: the share of the training that is done, in [0, 1].
        """
        self.loss._move(progress, None)
        self._move_ratio(progress)

    def get_extra_state(self) -> dict[str, Any]:
        """The progress of a schedule of ``kd_ratio``; part of ``state_dict``."""
        return {"progress": self.loss.progress}

    def set_extra_state(self, state: Any) -> None:
        """Take back what :meth:`get_extra_state` gave."""
        self._move_ratio(state["progress"])

    def forward(
        self,
        student: Tensor | Source,
        teacher: Tensor | TeacherSource | None,
        labels: Tensor,
        num_tokens: Denominator | None = None,
        *,
        token_weights: Tensor | None = None,
    ) -> KDOutput:
        """The objective of a batch; arguments as for :meth:`TokenLoss.forward`.

        ``teacher`` may be None where ``kd_ratio`` is 0. Where it is given it is not evaluated at
        ``kd_ratio`` 0 and ``kd_loss`` is None.
        """
        if teacher is None and self.kd_ratio > 0:
            raise ValueError(f"teacher: needed at kd_ratio {self.kd_ratio}, got None")
        batch = self.loss._batch(student, teacher, labels)
        weight = batch.weights(token_weights)
        divisor = batch.denominator(num_tokens)
        # At ratio 0 the teacher only had its say on the width of the vocabulary.
        problem = self.loss._problem(batch, with_teacher=self.kd_ratio > 0)
        count = len(problem.program.losses)
        factors = self.loss._weighted_factors(batch)[:count]
        total, kd, ce = evaluate(
            problem,
            weight.unsqueeze(-1) * (self.kd_ratio * factors / divisor),
            weight * ((1 - self.kd_ratio) / divisor),
            self.loss.chunking,
        )
        weight = weight.detach()
        column = weight.unsqueeze(-1)
        sums = (silenced(kd, column) * column).sum(0) / divisor
        return KDOutput(
            loss=total,
            class_loss=(silenced(ce, weight) * weight).sum() / divisor,
            kd_loss=(sums * factors).sum() if count else None,
            kd_terms=sums * self.loss._factors(batch) if count else None,
            num_tokens=torch.tensor(len(batch.rows.labels), device=labels.device),
        )

    def _move_ratio(self, progress: float) -> None:
        if self._schedule is not None:
            self.kd_ratio = self._schedule(progress)
