"""Sums behind the means in the training log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdrun.evaluation.measures import named_terms
from kdrun.models.heads import BALANCING
from kdrun.training.features import FEATURE_LOSS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdlosses import KDObjective


class LossSums:
    """Sums of the parts of the loss on this process since the last log line.

    Args:
        terms: number of terms of the loss.
        device: device of training.
        balanced: whether the student's experts have a load-balancing loss.
        features: whether there is a term on hidden states.

    Attributes:
        supervised_tokens: number in all micro-batches so far.
        moving_values: scheduled or stateful values in the last step, by name.
    """

    def __init__(
        self, terms: int, device: torch.device, balanced: bool = False, features: bool = False
    ) -> None:
        self._extra = [
            name for name, has in ((BALANCING, balanced), (FEATURE_LOSS, features)) if has
        ]
        self._shares = torch.zeros(2 + len(self._extra) + terms, device=device)
        self._step_terms = torch.zeros(terms, device=device)
        self._weights = torch.zeros(3, device=device)
        self._step_weights = self._weights.clone()
        self._logged_step = 0
        self._before_step = self._shares.clone()
        self.supervised_tokens = 0
        self.moving_values: Mapping[str, float] = {}

    def add(self, outputs: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's class loss, KD loss and terms."""
        parts = [outputs[name] for name in ("class_loss", "kd_loss", *self._extra)]
        self._shares += torch.cat([torch.stack(parts), outputs["kd_terms"]]).detach()
        self._step_terms += outputs["kd_terms"].detach()
        self._step_weights += outputs["weight_sums"].detach()
        self.supervised_tokens += int(outputs["num_tokens"])

    def begin_step(self) -> None:
        """Remember the sums, to exclude a step that is skipped."""
        self._before_step = self._shares.clone()

    def leave_out_step(self) -> None:
        """Undo additions since :meth:`begin_step`."""
        self._shares.copy_(self._before_step)
        self._step_weights.zero_()

    def take_step_terms(self, accelerator: Accelerator, wanted: bool) -> list[float] | None:
        """Return the terms of the loss in this step, over all processes; None if not needed."""
        found = accelerator.reduce(self._step_terms).tolist() if wanted else None
        self._step_terms.zero_()
        return found

    def take_step_weights(self, accelerator: Accelerator, wanted: bool) -> list[float] | None:
        """Return the sums of the token weights in this step, over all processes, if needed."""
        self._weights += self._step_weights
        found = accelerator.reduce(self._step_weights).tolist() if wanted else None
        self._step_weights.zero_()
        return found

    def begin_line(self, step: int) -> None:
        """Start the means of the next log line after a step."""
        self._logged_step = step
        self._shares.zero_()
        self._weights.zero_()

    def line(
        self,
        logs: dict[str, Any],
        step: int,
        skipped: int,
        objective: KDObjective,
        accelerator: Accelerator,
        more: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Add class loss, KD loss, terms and moving values to the Trainer's log line.

        Args:
            logs: the Trainer's line, whose ``loss`` was divided by all steps.
            step: optimiser steps done.
            skipped: number of steps skipped since the last line.
            objective: names the terms.
            accelerator: sums over processes, which must all call this.
            more: further training values, such as a procedure's.
        """
        logs, steps = dict(logs), step - self._logged_step
        loss = logs.pop("loss")
        if skipped:
            loss *= steps / max(1, steps - skipped)
            steps -= skipped
            logs["skipped_steps"] = skipped
            if not math.isfinite(logs.get("grad_norm", 0.0)):  # from the last step
                del logs["grad_norm"]
        if not steps:
            return logs
        shares = (accelerator.reduce(self._shares) / steps).tolist()
        moving = {name: x for name, x in self.moving_values.items() if math.isfinite(x)}
        return {
            "loss": loss,
            "class_loss": shares[0],
            "kd_loss": shares[1] if objective.needs_teacher else None,
            **dict(zip(self._extra, shares[2:], strict=False)),
            **named_terms(objective.loss, shares[2 + len(self._extra) :]),
            **self._mean_weight(objective, accelerator),
            **moving,
            **more,
            **logs,
        }

    def _mean_weight(self, objective: KDObjective, accelerator: Accelerator) -> dict[str, float]:
        """Mean token weight, before normalisation, and share of tokens with a weight above 0."""
        if objective.weighting is None:
            return {}
        total, positive, tokens = accelerator.reduce(self._weights).tolist()
        if not tokens:  # no step since the last line had a teacher
            return {}
        return {"token_weight": total / tokens, "token_weight_share": positive / tokens}

    def has_steps(self, step: int) -> bool:
        """Return whether there was a step since the last line."""
        return step != self._logged_step
