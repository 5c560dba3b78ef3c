"""The processes of a run: one of them writes and speaks, the others wait for it."""

from __future__ import annotations

import os

from kdrun.errors import InputError

_FOREIGN = {
    "ACCELERATE_USE_FSDP": "FSDP: on a CPU it runs DDP in silence, elsewhere it leaves out the "
    "teacher; launch without it, and let --set training.fsdp=true spread both models",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which kdrun has not been tried with; launch without "
    "it, and let --set training.fsdp=true spread the models",
}


class World:
    """The processes that torchrun or accelerate started, or this one alone.

    Args:
        fsdp: whether the run wants its models spread over processes.

    Attributes:
        size: how many there are.
        is_main: whether this is the one that writes and speaks.

    Raises:
        InputError: models to be spread over a single process, or by the launcher.
    """

    def __init__(self, fsdp: bool = False) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        for name, what in _FOREIGN.items():
            if os.environ.get(name, "false").lower() in ("1", "true"):
                raise InputError(f"accelerate was asked for {what}")
        if fsdp and self.size == 1:
            raise InputError(
                "training.fsdp=true spreads the models over processes, and there is one; start "
                "several: torchrun --nproc-per-node N -m kdrun ..."
            )

    def share(self, text: str) -> str:
        """What the main process has, such as a folder's name made from its clock."""
        if self.size == 1:
            return text
        import torch.distributed

        self.wait()
        values = [text]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all are here; the first call starts their group."""
        if self.size > 1:
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.accelerator.is_available()).wait_for_everyone()


def check_deepspeed(file: str | None) -> None:
    """Refuse ``training.deepspeed``, before anything is loaded.

    DeepSpeed replaces the calls of backward and of the optimiser, and gathers weights in a way of
    its own; the losses project with the head's weight inside its forward call. Nothing of that has
    been run, and a loss that is silently wrong is worse than none.

    Raises:
        InputError: always, where a file is given.
    """
    if file is None:
        return
    raise InputError(
        f"training.deepspeed={file}: kdrun has not been tried with DeepSpeed; "
        "--set training.fsdp=true under torchrun spreads weights, gradients and optimiser of both "
        "models as ZeRO-3 does"
    )
