"""Trackers: where the figures of a run are sent beside its own files, through transformers."""

from __future__ import annotations

import difflib
import netrc
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

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
    if name == "wandb":
        _check_wandb()


def _check_wandb() -> None:
    """Refuse wandb where it would ask for a login once the models are loaded."""
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return
    given = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if not given and not _in_netrc(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        raise InputError(
            "training.report_to=wandb: wandb is not logged in; run 'wandb login', set "
            "WANDB_API_KEY, or keep the figures here with WANDB_MODE=offline"
        )


def _in_netrc(url: str) -> bool:
    """Whether the user's netrc file, where 'wandb login' puts the key, knows a server."""
    home = Path(os.path.expanduser("~"))
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None:
                return True
    return False


def start_trackers(trainer: Trainer, name: str) -> None:
    """Let trackers begin before anything is trained, so that they fail before it.

    Args:
        trainer: has their callbacks.
        name: of ``training.report_to``.

    Raises:
        InputError: a tracker cannot begin, with its reason.
    """
    for callback in trainer.callback_handler.callbacks:
        setup = getattr(callback, "setup", None)
        if setup is None or getattr(callback, "_initialized", True):
            continue
        try:
            setup(trainer.args, trainer.state, trainer.model)
        except Exception as error:  # of whatever kind a tracker raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"training.report_to={name}: the tracker cannot begin ({reason}); mend it, or "
                "--report-to none"
            ) from error


def place_logs(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard's files written into a folder of the run, if they are written.

    transformers would put those of an evaluation before training into the working directory.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder)
