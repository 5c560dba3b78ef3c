"""The device that models run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def find_device() -> torch.device:
    """Return the accelerator of this machine, or the CPU if it has none that works."""
    import torch

    # By itself the name of the accelerator is that of the build, whether or not one is there.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
