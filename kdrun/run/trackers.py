"""Trackers: services that receive a run's metrics through transformers."""

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
# Names known to transformers, with alternative packages that provide them.
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
    """Refuse a tracker that is not available, without heavy imports.

    Args:
        name: of ``training.report_to``.

    Raises:
        InputError: the tracker is unknown or not installed.
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
            f"pip install {packages[0]}, or pass --report-to none"
        )
    if name == "wandb":
        _check_wandb()


def _check_wandb() -> None:
    """Refuse wandb if it would ask for a login after the models are loaded."""
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun"):
        return
    given = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if not given and not _in_netrc(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        raise InputError(
            "training.report_to=wandb: wandb is not logged in; run 'wandb login', set "
            "WANDB_API_KEY, or keep the metrics local with WANDB_MODE=offline"
        )


def _in_netrc(url: str) -> bool:
    """Return whether the user's netrc file, where 'wandb login' stores the key, has a server."""
    home = Path(os.path.expanduser("~"))
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None:
                return True
    return False


def start_trackers(trainer: Trainer, name: str) -> None:
    """Start trackers before training, so that they fail early.

    Args:
        trainer: provides their callbacks.
        name: of ``training.report_to``.

    Raises:
        InputError: a tracker cannot start.
    """
    for callback in trainer.callback_handler.callbacks:
        setup = getattr(callback, "setup", None)
        if setup is None or getattr(callback, "_initialized", True):
            continue
        try:
            setup(trainer.args, trainer.state, trainer.model)
        except Exception as error:  # trackers raise errors of any type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"training.report_to={name}: the tracker cannot start ({reason}); fix it, or "
                "pass --report-to none"
            ) from error


def place_logs(trainer: Trainer, folder: Path) -> None:
    """Direct TensorBoard's files, if enabled, to a folder of the run.

    transformers would write those of an evaluation before training to the working directory.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is None:
            callback.logging_dir = str(folder)
