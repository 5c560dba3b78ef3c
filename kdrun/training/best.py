"""The best evaluation of a run, and early stopping, both functions of what was logged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrun.config.training_sections import TrainingConfig

_HIGHER_IS_BETTER = ("eval_top1_agreement",)
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Best:
    """Which evaluation of a run counts, and when it has become no better for too long.

    Attributes:
        measure: a held-out measure, such as ``eval_ce``.
        patience: evaluations without a gain before training stops; None never stops it.
        smallest_gain: an improvement must be larger to count as a gain.
    """

    measure: str
    patience: int | None = None
    smallest_gain: float = 0.0

    @classmethod
    def of(cls, training: TrainingConfig) -> Best | None:
        """What a configuration asks for; None if the student is that of the last step."""
        if training.keep_best is None:
            return None
        return cls(training.keep_best, training.early_stopping, training.smallest_gain)

    def find(self, history: History) -> tuple[int, float] | None:
        """Return step and value of the first best evaluation in training; None without one.

        Args:
            history: the Trainer's ``log_history``.
        """
        best: tuple[int, float] | None = None
        for step, value in self._evaluations(history):
            if best is None or self._gain(best[1], value) > 0:
                best = step, value
        return best

    def stops(self, history: History) -> bool:
        """Return whether the last evaluations were in vain."""
        if self.patience is None:
            return False
        best, waited = None, 0
        for _, value in self._evaluations(history):
            if best is None or self._gain(best, value) > self.smallest_gain:
                best, waited = value, 0
            else:
                waited += 1
        return waited >= self.patience

    def _evaluations(self, history: History) -> Iterator[tuple[int, float]]:
        seen = {int(line["step"]): line[self.measure] for line in history if self.measure in line}
        for step, value in sorted(seen.items()):
            if step > 0 and value is not None and math.isfinite(value):
                yield step, float(value)

    def _gain(self, before: float, now: float) -> float:
        return now - before if self.measure in _HIGHER_IS_BETTER else before - now
