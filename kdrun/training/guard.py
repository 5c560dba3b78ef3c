"""What becomes of a step whose loss is not finite: the run stops, or the step is left out."""

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
"""From numbers of training rows to words for them, such as ``train.jsonl, lines 3, 9``."""


@dataclass(frozen=True)
class BadLoss:
    """The loss of a micro-batch that is not finite.

    Attributes:
        value: NaN or infinite.
        class_loss: its part from the data.
        kd_loss: its part from the teacher; None at a ratio of 0.
        rows: numbers of the training rows that it comes from; empty where they are not known.
    """

    value: float
    class_loss: float
    kd_loss: float | None
    rows: tuple[int, ...]


class LossGuard:
    """Watches the losses and gradients of each step, over all micro-batches and processes.

    Args:
        skip: leave a bad step out, instead of stopping the run.
        limit: steps in a row that may be left out.
        name_rows: words for training rows; without it they are numbers from 0.
        say: is told of steps that are left out.

    Attributes:
        skipped: steps that were left out.
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
        parts = f"class loss {bad.class_loss:.4g}{kd}"
        self._found.append(f"{_LOSS} is {bad.value} at step N ({parts}){rows}")

    def note_gradient(self, norm: float) -> None:
        """Remember the norm of a step's gradients where it is not finite, though the losses may be.

        Args:
            norm: over all weights and processes.
        """
        if not math.isfinite(norm):
            self._found.append(f"the norm of the gradients is {norm} at step N")

    def leaves_out(self, step: int, accelerator: Accelerator) -> bool:
        """Whether a step is left out, the same on all processes, which have to ask together.

        Args:
            step: its number, from 1.
            accelerator: the trainer's.

        Raises:
            TrainingError: loss or gradient is not finite, and the run is to stop.
        """
        found = self._on_all(accelerator)
        if not found:
            self._in_a_row = 0
            return False
        found.sort(key=lambda line: not line.startswith(_LOSS))  # it names rows
        said = found[0].replace("step N", f"step {step}")
        if not self._skip:
            raise TrainingError(
                f"{said}; lower optimizer.lr, take a loss that is finite for any pair of "
                "distributions, such as generalized_jsd_chunked, or leave such steps out with "
                "training.nan_loss=skip"
            )
        if self._in_a_row == self._limit:
            raise TrainingError(
                f"{said}, after {self._limit} steps in a row that were left out for that reason "
                "(training.max_skipped_steps); lower optimizer.lr, or mend the rows"
            )
        self.skipped += 1
        self._in_a_row += 1
        self._unlogged += 1
        if self._say is not None:
            self._say(f"{said}: the step is left out")
        return True

    def take_unlogged(self) -> int:
        """Steps that were left out since this was asked last."""
        count, self._unlogged = self._unlogged, 0
        return count

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Take back what :meth:`state` gave."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def _on_all(self, accelerator: Accelerator) -> list[str]:
        """What was noted on any process."""
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
