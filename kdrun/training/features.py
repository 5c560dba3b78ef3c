"""The term on hidden states in training: which states it compares, and its projectors.

The projectors are parameters of neither model. Their gradients are averaged over the processes and
clipped here, since the wrappers of the student do not know them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlosses import FeatureTerm
from kdrun.data.collate import IGNORE_INDEX, TEACHER_LABELS, split_inputs
from kdrun.errors import TrainingError
from kdrun.models.heads import Consumer, FrozenTeacher
from kdrun.models.hidden import find_layers, recorded
from kdrun.training.guard import BadLoss, LossGuard

if TYPE_CHECKING:
    from accelerate import Accelerator

FEATURE_LOSS = "feature_loss"
"""Key of the term in outputs and log lines, before its weight."""
_FILE = "projectors.pt"


@dataclass(frozen=True)
class Selected:
    """The tokens of a batch whose states are compared.

    Attributes:
        places: ``[n]``, positions in the flattened batch.
        sequences: ``[n]``, the sequence of each token.
    """

    places: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any], supervised_only: bool) -> Selected:
        """Select the positions that predict a supervised token, or all that are not padding."""
        labels, features = split_inputs(inputs)
        positions = features.get("position_ids")
        kept = labels != IGNORE_INDEX
        if not supervised_only:
            kept = _is_text(labels, features.get("attention_mask"), positions)
        starts = torch.zeros_like(labels)
        starts[:, 0] = 1
        if positions is not None:
            starts |= (positions == 0).long()
        return cls(
            kept.flatten().nonzero().squeeze(-1), (starts.flatten().cumsum(0))[kept.flatten()]
        )


def _is_text(labels: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    if mask is not None:
        return mask.bool()
    if positions is None:
        return torch.ones_like(labels, dtype=torch.bool)
    # Packed rows: each token of the padding is at position 0, and so is the next one.
    following = torch.nn.functional.pad(positions[:, 1:], (0, 1))
    return (positions > 0) | (following > 0)


class HiddenTerm:
    """Adds a term on hidden states to the loss of each micro-batch.

    Args:
        term: the term; its projectors are moved to the device.
        teacher: the live teacher.
        student: the student, a causal language model.
        device: device of training.

    Raises:
        InputError: the layers of a model are not found.
    """

    def __init__(
        self, term: FeatureTerm, teacher: FrozenTeacher, student: Any, device: torch.device
    ) -> None:
        self.term = term.to(device)
        self._teacher = find_layers(teacher.model, "teacher")
        self._student = find_layers(student, "student")

    @property
    def projectors(self) -> list[torch.nn.Parameter]:
        """The trained projectors; empty if the widths are equal or the loss needs none."""
        return list(self.term.parameters())

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record the layers of both models while they are called."""
        pairs = self.term.pairs
        with (
            recorded(self._teacher, (pair[0] for pair in pairs)) as of_teacher,
            recorded(self._student, (pair[1] for pair in pairs)) as of_student,
        ):
            yield Recording(self.term, of_teacher, of_student)

    def average(self, accelerator: Accelerator) -> None:
        """Average the projectors' gradients over the processes, as DDP does with the student's."""
        for weight in self.projectors if accelerator.num_processes > 1 else ():
            if weight.grad is not None:
                weight.grad = accelerator.reduce(weight.grad, "mean")

    def clip(self, max_norm: float) -> float:
        """Clip the projectors' gradients by themselves, and return their norm before.

        The logged norm stays that of the student.
        """
        limit = max_norm if max_norm > 0 else math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.projectors, limit))

    def clear(self) -> None:
        """Remove the projectors' gradients, after a step or one that is skipped."""
        self.term.zero_grad(set_to_none=True)

    def join(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Let the student's optimiser train the projectors too, as its last group."""
        if self.projectors:
            optimizer.add_param_group({"params": self.projectors, "weight_decay": weight_decay})

    @contextmanager
    def apart(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Take the projectors out of the optimiser while its state is saved or loaded.

        A sharded student's state is named after its weights, among which they are not.
        """
        if not self.projectors:
            yield
            return
        group = optimizer.param_groups.pop()
        states = {weight: optimizer.state.pop(weight, {}) for weight in self.projectors}
        try:
            yield
        finally:
            optimizer.param_groups.append(group)
            optimizer.state.update({weight: state for weight, state in states.items() if state})

    def save(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Save the projectors and the optimiser's state for them in a checkpoint."""
        if self.projectors:
            states = [optimizer.state.get(weight, {}) for weight in self.projectors]
            weights = [weight.detach() for weight in self.projectors]
            torch.save({"weights": weights, "states": states}, folder / _FILE)

    def load(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Load what :meth:`save` saved.

        Raises:
            TrainingError: the checkpoint has no projectors, or others.
        """
        if not self.projectors:
            return
        if not (folder / _FILE).is_file():
            raise TrainingError(
                f"{folder}: was saved by a run without projectors of hidden states; continue it as "
                "it was"
            )
        saved = torch.load(folder / _FILE, weights_only=True, map_location="cpu")
        shapes = [weight.shape for weight in self.projectors]
        if [weight.shape for weight in saved["weights"]] != shapes:
            raise TrainingError(f"{folder / _FILE}: has projectors of other layers or widths")
        for weight, value, state in zip(
            self.projectors, saved["weights"], saved["states"], strict=True
        ):
            weight.data.copy_(value)
            # As torch does: the number of steps stays where the optimiser keeps it.
            optimizer.state[weight] = {
                key: x.to(weight.device) if isinstance(x, Tensor) and key != "step" else x
                for key, x in state.items()
            }


class Recording:
    """The states of one micro-batch.

    Args:
        term: the term on them.
        of_teacher: states by layer, filled while the teacher is called.
        of_student: the same of the student.
    """

    def __init__(
        self, term: FeatureTerm, of_teacher: dict[int, Tensor], of_student: dict[int, Tensor]
    ) -> None:
        self._term, self._of_teacher, self._of_student = term, of_teacher, of_student

    def adding_to(
        self,
        consume: Consumer,
        inputs: Mapping[str, Any],
        step_tokens: Tensor | int | None,
        guard: LossGuard | None,
    ) -> Consumer:
        """Return a consumer of the student's head that adds the term to the loss.

        Call this when the teacher has been called. Of its states only those of the selected tokens
        are kept.

        Args:
            consume: evaluates the objective.
            inputs: the micro-batch.
            step_tokens: supervised tokens of the step; None counts those of the micro-batch.
            guard: records a term that is not finite; None disables the check.
        """
        if TEACHER_LABELS in inputs:  # streamed rows, which are not looked at before
            raise TrainingError(
                "features: hidden states are compared token by token, but a row has messages for "
                "the teacher; remove them, or features.spec"
            )
        selected = Selected.of(inputs, self._term.tokens == "supervised")
        numbers = sorted({pair[0] for pair in self._term.pairs})
        teacher = {number: _rows(self._of_teacher.pop(number), selected) for number in numbers}

        def add(student: Any) -> dict[str, Tensor]:
            out = consume(student)
            weighted, mean = self._term(
                [teacher[pair[0]] for pair in self._term.pairs],
                [_rows(self._of_student[pair[1]], selected) for pair in self._term.pairs],
                out["num_tokens"] if step_tokens is None else step_tokens,
                selected.sequences,
            )
            loss = out["loss"] + weighted
            if guard is not None:
                _watch(guard, loss, out, mean)
            return {**out, "loss": loss, FEATURE_LOSS: mean}

        return add


def _rows(states: Tensor, selected: Selected) -> Tensor:
    """The states of the selected tokens, on the device of the batch."""
    device = selected.places.device
    return states.flatten(0, 1)[selected.places.to(states.device)].to(device)


def _watch(guard: LossGuard, loss: Tensor, out: Mapping[str, Tensor], mean: Tensor) -> None:
    """Note a term that is not finite; an objective that is not has been noted already."""
    value = loss.detach().item()
    if not math.isfinite(value) and math.isfinite(out["loss"].item()):
        guard.note(BadLoss(value, out["class_loss"].item(), out["kd_loss"].item(), (), mean.item()))
