"""A served teacher in training: asked ahead, awaited by all processes alike, or given up."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdrun.served.client import ServerError
from kdrun.served.teacher import Ahead, ServedTeacher

if TYPE_CHECKING:
    from accelerate import Accelerator


class AskingAhead:
    """Asks a served teacher for the batches after the present one.

    Args:
        teacher: of the run.
        accelerator: of the run's processes.
    """

    def __init__(self, teacher: ServedTeacher, accelerator: Accelerator) -> None:
        self.teacher = teacher
        self._accelerator = accelerator
        self._ahead: Ahead | None = None

    def in_training(self, batches: Iterator[Any], most: int, needed: bool) -> Iterator[Any]:
        """Return an epoch's batches, the same iterator for the whole epoch.

        Args:
            batches: the epoch's own iterator.
            most: how many of them will be needed at most.
            needed: whether the present step needs the teacher.
        """
        if self._ahead is None or self._ahead.batches is not batches:
            self._ahead = self._over(batches, most)
        self._ahead.asks = needed
        if not needed:
            self.teacher.forget()
        return self._ahead

    def in_evaluation(self, loader: Any) -> Iterator[Any]:
        """Return the batches of an evaluation, which uses no answers of the step before it."""
        self.teacher.settle(())
        return self._over(iter(loader), len(loader))

    def _over(self, batches: Iterator[Any], most: int) -> Ahead:
        return Ahead(batches, self.teacher, most)

    def settle(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Wait for the answers of a step, before anything of it is computed.

        Raises:
            ServerError: on every process, if the server fails one of them.
        """
        with self.agreeing():
            self.teacher.settle(batches)

    def agreeing(self) -> _Agreeing:
        """Return a context in which a failure on one process is one on all."""
        return _Agreeing(self._accelerator)


class _Agreeing:
    """Processes that wait for one another must fail together."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, ServerError):
            return
        if self._accelerator.num_processes == 1:
            return
        failed = torch.tensor([float(error is not None)], device=self._accelerator.device)
        if float(self._accelerator.reduce(failed)) > 0 and error is None:
            raise ServerError("the server failed another process of this run")


@dataclass(frozen=True)
class RandomStates:
    """The states of all random number generators of a process.

    Attributes:
        python: of the standard library.
        numpy: of NumPy.
        cpu: of torch on the CPU.
        cuda: of torch on each GPU.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> RandomStates:
        """Return the present states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make them the present ones."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
