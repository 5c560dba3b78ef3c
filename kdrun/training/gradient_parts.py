"""Norms of the gradients of cross-entropy and distillation loss, and their cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

if TYPE_CHECKING:
    from kdrun.training.trainer import DistillTrainer

CLASS_NORM, KD_NORM, COSINE = "class_grad_norm", "kd_grad_norm", "grad_cosine"


class GradientParts(TrainerCallback):
    """Add ``class_grad_norm``, ``kd_grad_norm`` and ``grad_cosine`` to each log line.

    They describe the step that ends with the line: norms of the gradients of CE and KD over all
    trained weights, each before its weight in ``(1 - kd_ratio) * CE + kd_ratio * KD``, and the
    cosine between the two. At 1 both point the same way; below 0 they oppose each other. Equal
    values of ``kd_ratio`` do not mean equal strength: the effective weight of a loss is
    ``kd_ratio * kd_grad_norm``.

    Such a step takes the time of three, and the memory of one more set of gradients. Training is
    unchanged: the parts and the step draw the same random numbers.

    Args:
        trainer: the trainer whose log is extended.

    Raises:
        ValueError: the trainer uses ``args.fsdp``, which flattens gradients of whole layers.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "GradientParts: does not support args.fsdp; shard the models as kdrun's "
                "training.fsdp does"
            )
        self._trainer = trainer
        self._figures: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure a step that ends with a log line."""
        if (state.global_step + 1) % args.logging_steps == 0:
            self._figures = self._measure()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Add the values to a training log line."""
        if "loss" in logs:
            logs.update(self._figures)
            self._figures = {}

    def _measure(self) -> dict[str, float]:
        of_class = self._gradients(0.0)
        figures = {CLASS_NORM: math.sqrt(_product(of_class, of_class))}
        if self._trainer.teacher is not None:
            of_kd = self._gradients(1.0)
            figures[KD_NORM] = math.sqrt(_product(of_kd, of_kd))
            both = figures[CLASS_NORM] * figures[KD_NORM]
            if both > 0:  # the cosine is undefined for zero gradients
                figures[COSINE] = _product(of_class, of_kd) / both
        # The guard reports a loss that is not finite.
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _gradients(self, kd_ratio: float) -> list[Tensor | None]:
        """Return the current step's gradients at a ratio, and clear them in the model."""
        trainer = self._trainer
        batches, _ = trainer.step_batches
        trainer.model.train()
        with _same_random_numbers(trainer.args.device):
            for batch in batches:
                trainer.backward_at(kd_ratio, batch)
        scaler = trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        found = []
        for weight in trainer.model.parameters():
            # A copy, one at a time: DDP may keep gradients in buckets that the next pass fills.
            found.append(None if weight.grad is None else weight.grad / scale)
            weight.grad = None
        return found


def _same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Restore the random generators afterwards."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _product(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> float:
    """Return the inner product of two sets of gradients, over all processes if sharded."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None:
            part: Any = (a.float() * b.float()).sum()
            total += (part.full_tensor() if hasattr(part, "full_tensor") else part).item()
    return total
