"""Handling of steps whose loss is not finite: stop the run, or skip the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdrun.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

_LOSS = "the loss"

NameRows = Callable[[Sequence[int]], str]
"""Maps numbers of training rows to descriptions such as ``train.jsonl, lines 3, 9``."""


@dataclass(frozen=True)
class BadLoss:
    """The loss of a micro-batch that is not finite.

    Attributes:
        value: NaN or infinite.
        class_loss: its part from the data.
        kd_loss: its part from the teacher; None at a ratio of 0.
        rows: numbers of the training rows that cause it; empty if unknown.
        feature_loss: its part from hidden states; None unless that is what is not finite.
    """

    value: float
    class_loss: float
    kd_loss: float | None
    rows: tuple[int, ...]
    feature_loss: float | None = None


class LossGuard:
    """Check losses and gradients of each step, over all micro-batches and processes.

    Args:
        skip: skip a bad step instead of stopping the run.
        limit: maximum number of consecutive skipped steps.
        name_rows: describes training rows; without it they are numbered from 0.
        say: called with a line for each skipped step.

    Attributes:
        skipped: number of skipped steps.
    """

    def __init__(
        self,
        skip: bool = False,
        limit: int = 3,
        name_rows: NameRows | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._skip = skip
        self._limit = limit
        self._name_rows = name_rows or _numbers
        self._say = say
        self._found: list[str] = []
        self._in_a_row = 0
        self._unlogged = 0
        self.skipped = 0

    def note(self, bad: BadLoss) -> None:
        """Remember a bad micro-batch until the end of the step."""
        rows = f", from {self._name_rows(bad.rows)}" if bad.rows else ""
        kd = "" if bad.kd_loss is None else f", KD loss {bad.kd_loss:.4g}"
        hidden = "" if bad.feature_loss is None else f", feature loss {bad.feature_loss:.4g}"
        parts = f"class loss {bad.class_loss:.4g}{kd}{hidden}"
        self._found.append(f"{_LOSS} is {bad.value} at step N ({parts}){rows}")

    def note_gradient(self, norm: float) -> None:
        """Remember a step's gradient norm that is not finite, even if the losses are.

        Args:
            norm: norm over all weights and processes.
        """
        if not math.isfinite(norm):
            self._found.append(f"the norm of the gradients is {norm} at step N")

    def leaves_out(self, step: int, accelerator: Accelerator) -> bool:
        """Return whether to skip a step; all processes must call this and get the same answer.

        Args:
            step: number of the step, from 1.
            accelerator: accelerator of the trainer.

        Raises:
            TrainingError: loss or gradient is not finite, and the run must stop.
        """
        found = self._on_all(accelerator)
        if not found:
            self._in_a_row = 0
            return False
        found.sort(key=lambda line: not line.startswith(_LOSS))  # these name rows
        said = found[0].replace("step N", f"step {step}")
        if not self._skip:
            raise TrainingError(
                f"{said}; lower optimizer.lr, use a loss that is finite for any pair of "
                "distributions, such as generalized_jsd_chunked, or skip such steps with "
                "training.nan_loss=skip"
            )
        if self._in_a_row == self._limit:
            raise TrainingError(
                f"{said}, after {self._limit} consecutive steps skipped for that reason "
                "(training.max_skipped_steps); lower optimizer.lr, or fix the rows"
            )
        self.skipped += 1
        self._in_a_row += 1
        self._unlogged += 1
        if self._say is not None:
            self._say(f"{said}: the step is skipped")
        return True

    def take_unlogged(self) -> int:
        """Return the number of steps skipped since the last call."""
        count, self._unlogged = self._unlogged, 0
        return count

    def state(self) -> dict[str, int]:
        """Return the state for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Load what :meth:`state` returned."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def _on_all(self, accelerator: Accelerator) -> list[str]:
        """Collect the notes of all processes."""
        found, self._found = self._found, []
        if accelerator.num_processes == 1:
            return found
        import torch
        from accelerate.utils import gather_object

        count = torch.tensor(float(len(found)), device=accelerator.device)
        if accelerator.reduce(count).item() == 0:
            return []
        everywhere: list[str] = gather_object(found)
        return everywhere


def _numbers(rows: Sequence[int]) -> str:
    return f"training rows {', '.join(map(str, rows))} (counted from 0)"
