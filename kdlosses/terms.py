"""The weighted terms of a distillation loss, and their values that change during training."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from kdlosses.divergence import Loss
from kdlosses.schedules import Schedule

TEMPERATURE = "temperature"
_ALONG = tuple(step / 1000 for step in range(1001))  # progress at which schedules are checked


@dataclass(frozen=True)
class Term:
    """One loss of a weighted sum.

    Attributes:
        loss: the divergence or row loss.
        weight: its factor, above 0.
        name: name in logs and schedules.
    """

    loss: Loss
    weight: float
    name: str


class MovingTerms:
    """Terms with scheduled fields and state variables that change between steps.

    Args:
        terms: at least one term, with distinct names.
        schedules: schedules by field (``"alpha"``), or by term and field (``"reverse_kl.alpha"``).

    Raises:
        ValueError: no terms, duplicate names, weights that are not positive, or schedules of fields
            that do not exist, are not floats, or leave their bounds.
    """

    def __init__(self, terms: Sequence[Term], schedules: Mapping[str, Schedule]) -> None:
        self.terms = tuple(terms)
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("terms: at least one loss is needed")
        for term in self.terms:
            if names.count(term.name) > 1:
                raise ValueError(
                    f"{term.name} is given twice; use one term with the sum of the weights"
                )
            if not (math.isfinite(term.weight) and term.weight > 0):
                raise ValueError(f"{term.name}: its weight must be above 0, got {term.weight}")
        self._schedules: list[dict[str, Schedule]] = [{} for _ in self.terms]
        for key, schedule in schedules.items():
            index, field = _place(key, self.terms)
            _check(key, self.terms[index].loss, field, schedule)
            self._schedules[index][field] = schedule
        self.progress = 0.0
        self._states = [self._at(0.0, index).initial_state() for index in range(len(self.terms))]

    @property
    def bound(self) -> tuple[tuple[str, ...], ...]:
        """For each term, the names of its changing values."""
        return tuple(tuple(values) for values in self.values)

    @property
    def values(self) -> list[dict[str, float]]:
        """For each term, its changing values at present."""
        return [
            {**{field: at(self.progress) for field, at in schedules.items()}, **state}
            for schedules, state in zip(self._schedules, self._states, strict=True)
        ]

    @property
    def named_values(self) -> dict[str, float]:
        """The current values by field, with the term's name if there are several terms."""
        return {
            field if len(self.terms) == 1 else f"{term.name}.{field}": value
            for term, values in zip(self.terms, self.values, strict=True)
            for field, value in values.items()
        }

    @property
    def stateful(self) -> bool:
        """Whether any term has state."""
        return any(self._states)

    def curvature(self, index: int) -> float | None:
        """The curvature of a term at the current values of its fields."""
        return self._at(self.progress, index, self._states[index]).curvature()

    def curvatures(self, index: int) -> Iterator[float | None]:
        """The curvature of a term during the training."""
        for progress in _ALONG if self._schedules[index] else (self.progress,):
            yield self._at(progress, index, self._states[index]).curvature()

    def advance(self, progress: float, term_values: Sequence[float] | None) -> None:
        """Advance schedules and state after an optimiser step.

        Args:
            progress: the completed share of the training, in [0, 1].
            term_values: mean of each term over the step; None leaves the state unchanged.

        Raises:
            ValueError: a progress outside [0, 1], or a wrong number of values.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: must be in [0, 1], got {progress}")
        self.progress = progress
        if term_values is None:
            return
        if len(term_values) != len(self.terms):
            raise ValueError(
                f"term_values: expected {len(self.terms)} values, got {len(term_values)}"
            )
        for index, value in enumerate(term_values):
            if self._states[index]:
                now = self._at(progress, index)
                self._states[index] = now.next_state(self._states[index], value, progress)

    def _at(
        self, progress: float, index: int, state: Mapping[str, float] = MappingProxyType({})
    ) -> Loss:
        """The loss of a term with its scheduled fields at a progress, and in a state."""
        then = {field: at(progress) for field, at in self._schedules[index].items()}
        return self.terms[index].loss.model_copy(update={**then, **state})

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, which consists of numbers."""
        return {
            "terms": [term.name for term in self.terms],
            "progress": self.progress,
            "states": [dict(state) for state in self._states],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state from :meth:`state`.

        Raises:
            ValueError: the state belongs to another loss.
        """
        names = [term.name for term in self.terms]
        if state["terms"] != names:
            was, now = (" + ".join(each) for each in (state["terms"], names))
            raise ValueError(f"the state was saved with the loss {was}, but this loss is {now}")
        self.progress = float(state["progress"])
        self._states = [dict(entry) for entry in state["states"]]


def _place(key: str, terms: Sequence[Term]) -> tuple[int, str]:
    """The term and the field of a key of the schedules."""
    name, _, field = key.rpartition(".")
    having = [
        index
        for index, term in enumerate(terms)
        if name in ("", term.name) and field in type(term.loss).model_fields
    ]
    if len(having) == 1:
        return having[0], field
    if having:
        examples = " or ".join(f"{terms[index].name}.{field}" for index in having)
        raise ValueError(f"schedules: {key} is a parameter of several losses; write {examples}")
    known = [f"{term.name}.{field}" for term in terms for field in type(term.loss).model_fields]
    raise ValueError(
        f"schedules: no loss has a parameter {key!r}; known: {', '.join([TEMPERATURE, *known])}"
    )


def _check(key: str, loss: Loss, field: str, schedule: Schedule) -> None:
    kind = type(loss).model_fields[field].annotation
    if kind is not float:
        raise ValueError(
            f"schedules: {key} cannot be scheduled, because it is not a number ({kind})"
        )
    for value in schedule.extremes:
        _check_value(key, loss, field, value)
    # Also check values in between, because a field may exclude values within its bounds. Warnings
    # are suppressed here, since the ends have already produced them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in dict.fromkeys(map(schedule, _ALONG)):
            _check_value(key, loss, field, value)


def _check_value(key: str, loss: Loss, field: str, value: float) -> None:
    try:
        type(loss)(**{**loss.model_dump(), field: value})
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"schedules: {key} reaches {value:g}: {reason}") from error
