"""Trackers: where the figures of a run are sent beside its own files, through transformers."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import Trainer

_NONE = "none"
# By the name that transformers knows: packages of which one is needed.
_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not there; nothing heavy is imported.

    Args:
        name: of ``training.report_to``.

    Raises:
        InputError: an unknown tracker, with a close name, or one that is not installed.
    """
    if name == _NONE:
        return
    if name not in _PACKAGES:
        close = difflib.get_close_matches(name, [*_PACKAGES, _NONE], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(_PACKAGES)}, none"
        raise InputError(f"training.report_to={name}: no such tracker; {hint}")
    packages = _PACKAGES[name]
    if all(find_spec(package) is None for package in packages):
        raise InputError(
            f"training.report_to={name}: {packages[0]} is not installed; "
            f"pip install {packages[0]}, or --report-to none"
        )


def place_logs(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard's files written into a folder of the run, if they are written.

    transformers would put those of an evaluation before training into the working directory.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder)
