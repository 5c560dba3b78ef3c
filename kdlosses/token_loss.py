"""A loss as a module over the supervised tokens of a batch, plain or chunked."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlosses.batch import Batch, Denominator
from kdlosses.compressed import TeacherSource
from kdlosses.divergence import Loss, RowLoss
from kdlosses.engine import (
    Chunking,
    Problem,
    Program,
    evaluate,
    refusal,
    silenced,
    view_of,
    weight_refusal,
)
from kdlosses.schedules import Schedule
from kdlosses.sources import Source, VocabParallel
from kdlosses.terms import TEMPERATURE, MovingTerms, Term
from kdlosses.token_weight import TokenWeighting


class TokenLoss(nn.Module):
    """A distillation loss over the supervised tokens of a batch, created by :func:`get_loss`.

    The value is ``sum_k v_k T ** power_k sum_i w_i D_k(p_i, q_i) / num_tokens`` over the rows ``i``
    whose label is not ignored and the terms ``k`` of a weighted sum (usually one, with weight 1),
    with ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``.

    Args:
        loss: the divergence or row loss, or the terms of a weighted sum.
        chunking: None for the plain evaluation by autograd on full logits.
        temperature: T > 0, softens both distributions.
        temperature_scaling: whether each term is multiplied by ``T ** temperature_power``
            (Hinton et al. 2015); TRL, Liger and DistiLLM do not.
        ignore_index: label of ignored positions.
        vocab_size: both sides are cut to this many entries before the softmax; by default to the
            smaller of the two heads.
        match_curvature: divide each term by its curvature, so that near equality it is as strong as
            KL and a ``kd_ratio`` has the same meaning for every loss.
        schedules: schedules of ``temperature``, of fields (``"alpha"``), or of fields of one term
            of a sum (``"reverse_kl.alpha"``). :meth:`advance` updates them.

    Raises:
        ValueError: a temperature or vocabulary size that is not positive, ``match_curvature`` for a
            loss without curvature, or invalid terms or schedules.
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
        """The weighted losses of the sum; usually one."""
        return self._moving.terms

    @property
    def loss(self) -> Loss:
        """The single loss.

        Raises:
            ValueError: a sum of several losses; see :attr:`terms`.
        """
        if len(self.terms) > 1:
            names = ", ".join(term.name for term in self.terms)
            raise ValueError(f"a sum has no single loss; use one of {names}")
        return self.terms[0].loss

    @property
    def progress(self) -> float:
        """The current progress of schedules."""
        return self._moving.progress

    @property
    def stateful(self) -> bool:
        """Whether :meth:`advance` needs the values of the terms."""
        return self._moving.stateful

    @property
    def moving_values(self) -> dict[str, float]:
        """The current values of scheduled parameters and state variables, by name."""
        temperature = {TEMPERATURE: self.temperature} if self._temperature_schedule else {}
        return {**temperature, **self._moving.named_values}

    def advance(self, progress: float, term_values: Sequence[float] | None = None) -> None:
        """Advance schedules and state; call it once after each optimiser step.

        Args:
            progress: the completed share of the training, in [0, 1].
            term_values: mean of each term over the supervised tokens of the step, over all
                micro-batches and ranks (:attr:`KDOutput.kd_terms`); only needed by stateful losses.

        Raises:
            ValueError: a progress outside [0, 1], or missing values for a stateful loss.
        """
        if self.stateful and term_values is None:
            raise ValueError(
                "term_values: a loss with state needs the mean of each term over the step"
            )
        self._move(progress, term_values)

    def get_extra_state(self) -> dict[str, Any]:
        """Progress and state variables as numbers; part of ``state_dict``."""
        return self._moving.state()

    def set_extra_state(self, state: Any) -> None:
        """Restore the state from :meth:`get_extra_state`."""
        self._moving.restore(state)
        self._move_temperature()

    def extra_repr(self) -> str:
        """Describe the losses and how they are evaluated."""
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
        """Compute the loss of a batch.

        Args:
            student: logits ``[..., V]`` or :class:`Projected`.
            teacher: logits, :class:`Projected`, or a compressed teacher (:class:`TopK`,
                :class:`Sampled`); it never receives a gradient.
            labels: ``[...]``, aligned with the logits: ``labels[..., i]`` is the target of
                ``logits[..., i, :]``. Positions with ``ignore_index`` are ignored.
            num_tokens: the denominator; by default the number of supervised tokens of this call.
                If a step is split, pass the number over all micro-batches and ranks.
            token_weights: weight of each position's value, ``[...]``.
            reduction: ``"mean"`` or ``"none"``.

        Returns:
            A 0-d tensor, or with ``reduction="none"`` the values ``[...]``, 0 where ignored
            (``num_tokens`` must then not be given). Without supervised tokens the value is 0 with
            zero gradients.

        Raises:
            ValueError: inconsistent shapes, labels outside the vocabulary, or a compressed teacher
                that the loss or its temperature does not support.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
        if teacher is None:
            raise TypeError("teacher: expected logits or kdlosses.Projected, got NoneType")
        per_row = reduction == "none"
        if per_row and num_tokens is not None:
            raise ValueError("num_tokens: cannot be used with reduction='none'")
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

    def _problem(
        self, batch: Batch, with_teacher: bool = True, weighting: TokenWeighting | None = None
    ) -> Problem:
        """The input of the engine; without the teacher, unweighted cross-entropy alone."""
        if batch.teacher is None or not with_teacher:
            program = Program(student_post=batch.student.post, vocabulary=batch.student.vocabulary)
            return Problem(program, batch.student, None, batch.rows, (), batch.vocab_size)
        for term in self.terms:
            reason = refusal(term.loss, batch.teacher, self.temperature)
            if reason is not None:
                raise ValueError(f"teacher: {reason}")
            if isinstance(batch.student, VocabParallel) and isinstance(term.loss, RowLoss):
                name = type(term.loss).__name__
                raise ValueError(f"student: {name} needs whole rows, but its head is sharded")
        softened = self.temperature != 1.0 or self._temperature_schedule is not None
        weight = None if weighting is None else weighting.weight
        if weight is not None:
            reason = weight_refusal(weight, batch.teacher, softened)
            if reason is not None:
                raise ValueError(f"teacher: {reason}")
        state = {} if weighting is None else weighting.values
        program = Program(
            losses=tuple(term.loss for term in self.terms),
            bound=self._moving.bound,
            student_post=batch.student.post,
            view=view_of(batch.teacher),
            softened=softened,
            vocabulary=batch.student.vocabulary,
            weight=weight,
            weight_bound=tuple(state),
            weighs_ce=weighting is not None and weighting.on == "both",
        )
        moving = [value for values in self._moving.values for value in values.values()]
        numbers = (self.temperature, *moving, *state.values())
        scalars = tuple(batch.scalar(value) for value in numbers)
        placed = weight is not None and weight.uses_position
        positions = (batch.rows.positions,) if placed else ()
        sides = (batch.student, batch.teacher, batch.rows)
        return Problem(program, *sides, scalars, batch.vocab_size, positions)

    def _factors(self, batch: Batch) -> Tensor:
        """The factors from raw to reported values of the terms, ``[k]``."""
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
            f"match_curvature: {term.name} has no curvature to match (curvature() returns "
            f"{curvature})"
        )
    return curvature
