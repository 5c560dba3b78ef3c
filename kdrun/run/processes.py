"""The processes of a run: the main one writes files and output, the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from kdrun.errors import InputError

_FOREIGN = {
    "ACCELERATE_USE_FSDP": "FSDP: on a CPU it silently runs DDP, elsewhere it does not shard "
    "the teacher; launch without it, and shard both models with --set training.fsdp=true",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which kdrun has not been tested with; launch without "
    "it, and shard the models with --set training.fsdp=true",
}


class World:
    """The processes that torchrun or accelerate started, or only this one.

    Args:
        fsdp: whether the models are to be sharded across processes.

    Attributes:
        size: number of processes.
        is_main: whether this process writes files and output.

    Raises:
        InputError: models would be sharded over one process, or by the launcher.
    """

    def __init__(self, fsdp: bool = False) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        for name, what in _FOREIGN.items():
            if os.environ.get(name, "false").lower() in ("1", "true"):
                raise InputError(f"accelerate was asked for {what}")
        if fsdp and self.size == 1:
            raise InputError(
                "training.fsdp=true shards the models across processes, but there is only one; "
                "start several: torchrun --nproc-per-node N -m kdrun ..."
            )

    def share(self, text: str) -> str:
        """Return the main process's text, such as a folder name made from its clock."""
        if self.size == 1:
            return text
        import torch.distributed

        self.wait()
        values = [text]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do something before the others, which then find its result."""
        if not self.is_main:
            self.wait()
        try:
            yield
        finally:  # also if it failed: the others fail in the same way
            if self.is_main:
                self.wait()

    def wait(self) -> None:
        """Wait for all processes; the first call starts their group."""
        if self.size > 1:
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()


def check_deepspeed(file: str | None) -> None:
    """Refuse ``training.deepspeed``, before anything is loaded.

    DeepSpeed replaces the backward and optimiser calls and gathers weights in its own way, while
    the losses project with the head's weight inside its forward call. This combination is
    untested, and its loss could be silently wrong.

    Raises:
        InputError: a file is given.
    """
    if file is None:
        return
    raise InputError(
        f"training.deepspeed={file}: kdrun has not been tested with DeepSpeed; "
        "--set training.fsdp=true under torchrun shards weights, gradients and optimiser of both "
        "models as ZeRO-3 does"
    )
