"""Input of a run that its own beginning would remove: a model or file of the run it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.config.sections import BUILT_IN
from kdrun.errors import InputError
from kdrun.models.pairs import locate_pair
from kdrun.paths import expand_home
from kdrun.run.folder import written_by_runs

if TYPE_CHECKING:
    from kdrun.config.sections import RunConfig


def check_keeps_inputs(config: RunConfig, folder: Path) -> None:
    """Refuse a run whose beginning removes what it learns from; nothing is written yet.

    Adapters that are trained on a student in the run's folder would also name the folder that they
    are saved to as their base model.

    Args:
        config: names models, rows and a cache.
        folder: that the run takes.

    Raises:
        InputError: naming the input, and the cure.
    """
    removed = [path.resolve() for path in written_by_runs(folder)]
    for key, path in _inputs(config):
        if any(path.resolve().is_relative_to(place) for place in removed):
            raise InputError(
                f"--output {folder}: replacing the run in it would remove {path}, which is "
                f"{key}; name another folder"
            )


def _inputs(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """What a run reads on this machine, with the key that names it."""
    teacher, student = locate_pair(config.model)
    for key, source in (("model.teacher", teacher), ("model.student", student)):
        if source is None:
            continue
        for adapter in source.adapters:
            yield key, Path(adapter)
        if source.is_local:
            what = f"the base model of {key}" if source.adapters else key
            yield what, Path(source.path)
    data = config.data
    named = {
        "data.train": data.train,
        "data.eval": data.eval,
        "data.test": data.test,
        "model.teacher_cache": config.model.teacher_cache,
        "procedure.text": config.procedure.text,
    }
    for key, given in named.items():
        if given is not None and given != BUILT_IN:
            yield key, expand_home(given)
