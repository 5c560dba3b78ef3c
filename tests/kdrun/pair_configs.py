"""The configuration of a run with a small pair."""

from __future__ import annotations

from typing import Any

from kdrun.config.load import load_config
from kdrun.config.sections import RunConfig


def config_of(pair: Any, **given: Any) -> RunConfig:
    """The configuration of a pair; keys are written as ``section__key``."""
    overrides = {
        "model.teacher": str(pair.teacher),
        "model.student": str(pair.student),
        "data.train": str(pair.rows),
        "data.max_length": 128,
        **{key.replace("__", "."): value for key, value in given.items()},
    }
    return load_config(None, list(overrides.items()))
