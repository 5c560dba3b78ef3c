"""Procedures: which text a student learns from, written once for every loss.

A procedure may replace the rows of a step by text that the student or the teacher writes, and may
weigh the losses on them. It has no trainer of its own. The public names are imported on first use,
so that listing procedures does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdrun.procedures.base import LossRows as LossRows
    from kdrun.procedures.base import Origin as Origin
    from kdrun.procedures.base import Procedure as Procedure
    from kdrun.procedures.registry import ProcedureRef as ProcedureRef
    from kdrun.procedures.registry import available_procedures as available_procedures
    from kdrun.procedures.registry import get_procedure as get_procedure
    from kdrun.procedures.sampling import Sample as Sample
    from kdrun.procedures.sampling import Sampling as Sampling
    from kdrun.procedures.session import Session as Session
    from kdrun.procedures.testing import check_procedure as check_procedure

_HOME = {
    "LossRows": "base",
    "Origin": "base",
    "Procedure": "base",
    "ProcedureRef": "registry",
    "Sample": "sampling",
    "Sampling": "sampling",
    "Session": "session",
    "available_procedures": "registry",
    "check_procedure": "testing",
    "get_procedure": "registry",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdrun.procedures' has no attribute {name!r}")
    return getattr(import_module(f"kdrun.procedures.{_HOME[name]}"), name)
