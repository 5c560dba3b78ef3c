"""kdrun: distil a student with any registered loss, from the command line or from Python.

The public names are imported on first use, so that ``kdrun --help`` loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrun.config.sections import RunConfig as RunConfig
    from kdrun.run.distill import distill as distill
    from kdrun.training.trainer import DistillTrainer as DistillTrainer

_HOME = {
    "DistillTrainer": "training.trainer",
    "RunConfig": "config.sections",
    "distill": "run.distill",
}

__all__ = ["DistillTrainer", "RunConfig", "distill"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'kdrun' has no attribute {name!r}")
    return getattr(import_module(f"kdrun.{_HOME[name]}"), name)
