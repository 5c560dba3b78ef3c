"""Devices of a teacher that does not run beside its student."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdrun.config.sections import ModelConfig

_KEY = "model.teacher_device"
_USABLE = 0.9  # of a device's free memory; the rest is for activations
DeviceMap = Mapping[str, "int | str"]


def check_teacher_device(model: ModelConfig, fsdp: bool) -> None:
    """Refuse a device of the teacher that has no effect, without looking at this machine.

    Args:
        model: names the teacher.
        fsdp: whether both models are to be sharded.

    Raises:
        InputError: there is no teacher, or it is to be sharded.
    """
    given = model.teacher_device
    if given is None:
        return
    if model.teacher is None:
        raise InputError(f"{_KEY}={given} has no effect without a teacher; remove it")
    if fsdp:
        raise InputError(
            f"{_KEY}={given} conflicts with training.fsdp=true, which shards the teacher beside "
            "the student; remove one of the two"
        )


def refuse_teacher_device(model: ModelConfig, command: str) -> None:
    """Refuse the key in a command that evaluates the teacher itself.

    Raises:
        InputError: it is set.
    """
    if model.teacher_device is not None:
        raise InputError(f"{_KEY}: {command} does not support it; remove it")


def teacher_devices(given: str | None) -> Sequence[int | str] | None:
    """Return the devices that hold a teacher; None for the device of its student.

    Args:
        given: the configured value.

    Raises:
        InputError: the teacher is to be spread, but each device has a student.
    """
    if given != "auto":
        return None if given is None else [given]
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    students = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = free_devices(count, int(os.environ.get("LOCAL_RANK", "0")), students)
    if not found:
        raise InputError(
            f"{_KEY}=auto needs more accelerators than the {students} used by students, and this "
            f"machine has {count}; remove it, or pass cpu"
        )
    return found


def free_devices(count: int, rank: int, students: int) -> list[int]:
    """Return the accelerators for the teacher of one process; no two processes share one.

    Args:
        count: number of accelerators.
        rank: number of the process on this machine; its student uses the device of this number.
        students: number of processes on this machine.
    """
    return list(range(students + rank, count, students))


def place(model: PreTrainedModel, devices: Sequence[int | str]) -> None:
    """Move a model to devices, by blocks of layers if there are several.

    Raises:
        InputError: it does not fit.
    """
    if len(devices) == 1:
        only: Any = devices[0]
        model.to(only)
        return
    import torch

    free = {n: int(_USABLE * torch.accelerator.get_memory_info(n)[0]) for n in devices}
    spread(model, device_map(model, free))


def device_map(model: PreTrainedModel, free: Mapping[int | str, int]) -> DeviceMap:
    """Assign the blocks of a model to devices, evenly by bytes.

    Args:
        model: on any device.
        free: usable bytes of each device.

    Raises:
        InputError: it does not fit.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    blocks = list(model._no_split_modules or ())
    limits = get_balanced_memory(model, dict(free), no_split_module_classes=blocks)
    found: dict[str, int | str] = infer_auto_device_map(
        model, limits, no_split_module_classes=blocks
    )
    if not set(found.values()) <= set(free):
        total = sum(free.values()) / 2**30
        raise InputError(
            f"{_KEY}=auto: the teacher does not fit in the {total:.1f} GiB of the other devices; "
            "use more of them, or model.teacher_quantization=nf4"
        )
    return found


def spread(model: PreTrainedModel, placed: DeviceMap) -> None:
    """Move the blocks of a model to their devices; hooks move what passes between them.

    Args:
        model: changed in place.
        placed: the device of each module; embeddings first.
    """
    from accelerate import dispatch_model

    first = next(iter(placed.values()))
    dispatch_model(
        model,
        dict(placed),
        main_device=first,
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,
    )
