"""One run from its configuration to its folder: what ``kdrun`` and ``kdrun.distill`` do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.models.locate import STUDENT
from kdrun.quiet import quiet_libraries
from kdrun.run.check import check, resolve
from kdrun.run.folder import one_line_where_nothing_can_be_written, saying_how_to_go_on
from kdrun.run.precision import settle_precision
from kdrun.run.prepare import prepare
from kdrun.run.start import open_folder, recall

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.config.sections import RunConfig
    from kdrun.data.prepare import RawRows
    from kdrun.run.start import Start


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: the run's folder.
        summary: the content of ``summary.json``.
    """

    folder: Path
    summary: Mapping[str, Any]

    @property
    def student(self) -> Path:
        """The folder of the trained student."""
        return self.folder / STUDENT


def distill(
    config: RunConfig | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Distil a student, as the command ``kdrun`` does.

    Args:
        config: a :class:`RunConfig` or its sections as a mapping.
        resume: continue the run in ``output.dir`` from its newest complete checkpoint.
        overwrite: replace the run in ``output.dir``.
        console: where progress is shown; by default standard error.

    Returns:
        The run's folder and its summary.

    Raises:
        InputError: wrong input; nothing was overwritten.
        TrainingError: training failed, such as a loss that became NaN.
        Interrupted: stopped by Ctrl-C, after a checkpoint was saved.
        UnwritableError: the disk is full, or the folder is no longer writable.
    """
    config = resolve(config)
    if resume:
        config = recall(config)
    rows = check(config)
    config = settle_precision(config)
    with open_folder(config, resume, overwrite, console) as start:
        return _run(config, rows, start)


def _run(config: RunConfig, rows: RawRows, start: Start) -> RunResult:
    """Run the distillation, from checked input to student and summary."""
    finished = start.read_summary()
    if finished is not None:
        start.say(f"the run in {start.folder} is finished; nothing is left to do")
        return RunResult(start.folder, finished)

    with quiet_libraries(), one_line_where_nothing_can_be_written(start.folder):
        from kdrun.run.build import begin, build
        from kdrun.run.finish import finish
        from kdrun.run.load import load
        from kdrun.run.record import check_unchanged
        from kdrun.run.rehearse import rehearse, tell_lost_mass
        from kdrun.run.train import train

        began = time.monotonic()
        prepared = prepare(config, rows, start.say)
        config = config.model_copy(update={"data": prepared.data})
        loaded = load(config, prepared, start)
        with closing(loaded.teacher):
            inputs, changes = check_unchanged(
                config, prepared, loaded.teacher, loaded.initial, start.begun
            )
            built = build(config, prepared, loaded, start)
            tell_lost_mass(loaded, prepared, config.training.batch_size, start)
            rehearse(built, loaded, start)
            begin(built, prepared.pair.fresh_student, inputs, start)
            before = train(built, start)
            with saying_how_to_go_on(start.folder):
                summary = finish(built, loaded, before, changes, began, start)
    return RunResult(start.folder, summary)
