"""Check that a run does not remove its own input: a model or file of the run it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.config.base import BUILT_IN
from kdrun.config.data_section import Sources
from kdrun.errors import InputError
from kdrun.models.pairs import locate_pair
from kdrun.paths import expand_home
from kdrun.run.folder import written_by_runs

if TYPE_CHECKING:
    from kdrun.config.sections import RunConfig


def check_keeps_inputs(config: RunConfig, folder: Path) -> None:
    """Refuse a run that would remove its own input; nothing is written yet.

    Adapters trained on a student in the run's folder would also record the folder that they are
    saved to as their base model.

    Args:
        config: names models, rows and cache.
        folder: folder of the run.

    Raises:
        InputError: the run would remove one of its inputs.
    """
    removed = [path.resolve() for path in written_by_runs(folder)]
    for key, path in _inputs(config):
        if any(path.resolve().is_relative_to(place) for place in removed):
            raise InputError(
                f"--output {folder}: replacing the run in it would remove {path}, which is "
                f"{key}; choose another folder"
            )


def _inputs(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Yield the local files and folders that a run reads, with the keys that name them."""
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
    named: dict[str, Sources | None] = {
        "data.train": data.train,
        "data.sources": tuple(source.path for source in data.sources),
        "data.eval": data.eval,
        "data.test": data.test,
        "model.teacher_cache": config.model.teacher_cache,
        "procedure.text": config.procedure.text,
    }
    for key, given in named.items():
        for one in (given,) if isinstance(given, str) else given or ():
            if one != BUILT_IN:
                yield key, expand_home(one)
