"""A teacher that is the running mean of its student's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import TrainingError
from kdrun.models.heads import FrozenTeacher, HeadSplit
from kdrun.models.self_teacher import SelfTeacher

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "teacher_mean.safetensors"


class MeanTeacher(FrozenTeacher):
    """A copy of the student whose weights follow it: mean <- decay * mean + (1 - decay) * weights.

    Reference: Tarvainen and Valpola 2017, arXiv:1703.01780.

    Args:
        model: a copy of the student at its start, in the student's type: 16 bits would round the
            changes away.
        split: how it computes logits.
        decay: share of the mean that a step keeps, in (0, 1).
    """

    def __init__(self, model: Any, split: HeadSplit, decay: float) -> None:
        super().__init__(model, split)
        self._decay = decay

    def follow(self, student: nn.Module) -> None:
        """Move towards the student's weights, after an optimiser step; every process must call it.

        Args:
            student: without its wrapper; sharded as the teacher, or not at all.
        """
        import torch

        _reshard(self.model)
        _reshard(student)
        with torch.no_grad():
            for mean, now in zip(self.model.parameters(), student.parameters(), strict=True):
                mean.mul_(self._decay).add_(now, alpha=1 - self._decay)
            for kept, there in zip(self.model.buffers(), student.buffers(), strict=True):
                kept.copy_(there)

    def state(self) -> dict[str, Tensor]:
        """Return the mean, whole, on the CPU; every process must call it."""
        _reshard(self.model)
        return {name: _whole(value) for name, value in self.model.named_parameters()}

    def load(self, folder: Path) -> None:
        """Load the mean from a checkpoint.

        Raises:
            TrainingError: the checkpoint has none.
        """
        _reshard(self.model)
        _load(dict(self.model.named_parameters()), folder)


class MeanAdapters(SelfTeacher):
    """The student with the running mean of its adapters, which alone are kept twice.

    Args:
        model: the student, before adapters are added.
        split: how it computes logits.
        decay: share of the mean that a step keeps, in (0, 1).
    """

    def __init__(self, model: Any, split: HeadSplit, decay: float) -> None:
        super().__init__(model, split, live=True)
        self._decay = decay
        self._mean: dict[str, Tensor] = {}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: x for name, x in self.model.named_parameters() if x.requires_grad}

    def _means(self) -> dict[str, Tensor]:
        """Return the means, which begin with the weights; where the student is."""
        for name, weight in self._trained().items():
            there = self._mean.get(name)
            if there is None:
                self._mean[name] = weight.detach().clone()
            elif there.device != weight.device:
                self._mean[name] = there.to(weight.device)
        return self._mean

    def begin(self, adapted: Any) -> None:
        """Use the student with its adapters, with which the mean begins."""
        super().begin(adapted)
        self._mean = {}
        self._means()

    def follow(self, student: nn.Module) -> None:
        """Move towards the adapters, after an optimiser step."""
        import torch

        del student
        means = self._means()
        with torch.no_grad():
            for name, weight in self._trained().items():
                means[name].mul_(self._decay).add_(weight, alpha=1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """Return the mean, on the CPU."""
        return {name: _whole(value) for name, value in self._means().items()}

    def load(self, folder: Path) -> None:
        """Load the mean from a checkpoint.

        Raises:
            TrainingError: the checkpoint has none.
        """
        _load(self._means(), folder)

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        means, weights = self._means(), self._trained()
        own = {name: weight.data for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.data = means[name]
        try:
            with super()._as_teacher():
                yield
        finally:
            for name, weight in weights.items():
                weight.data = own[name]


def save_mean(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a mean to a checkpoint."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in state.items()}, folder / FILE)


def _load(there: Mapping[str, Tensor], folder: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not (folder / FILE).is_file():
        raise TrainingError(
            f"{folder}: has no mean of the student's weights; it was saved without "
            "model.teacher_ema, continue it as it was"
        )
    found = load_file(folder / FILE)
    with torch.no_grad():
        for name, value in there.items():
            kept = found[name].to(value.device)
            if isinstance(value, DTensor):
                kept = distribute_tensor(kept, value.device_mesh, value.placements)
            value.copy_(kept)


def _whole(value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    found = value.full_tensor() if isinstance(value, DTensor) else value
    return found.detach().cpu()


def _reshard(model: nn.Module) -> None:
    """Leave each process its part alone: a forward pass leaves some weights gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
