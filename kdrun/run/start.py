"""Where a run takes place: its folder, its processes, and the checkpoint that it goes on from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.config.load import stated_values
from kdrun.errors import InputError
from kdrun.files import find_damage, hold_folder
from kdrun.models.locate import STUDENT, holds_model
from kdrun.paths import expand_home
from kdrun.quiet import make_console
from kdrun.run import folder as runs
from kdrun.run.overwrite import check_keeps_inputs
from kdrun.run.processes import World
from kdrun.run.record import Record
from kdrun.training.checkpoint import SHARDS, Found, find_checkpoint, is_last, step_of

if TYPE_CHECKING:
    from rich.console import Console

    from kdrun.config.sections import RunConfig, TrainingConfig


@dataclass(frozen=True)
class Start:
    """Where a run takes place and where it begins.

    Attributes:
        folder: the run's.
        world: its processes.
        console: shows what it does; quiet on all processes but the main one.
        resume: whether it goes on in a folder that has it already.
        checkpoint: that it goes on from; None begins anew.
        trained: whether the checkpoint is that of its last step.
        notes: checkpoints that it cannot go on from, and settings that change, a line each.
    """

    folder: Path
    world: World
    console: Console
    resume: bool
    checkpoint: Path | None
    trained: bool
    notes: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """Optimiser steps that are done already."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def begun(self) -> Path | None:
        """The folder, if the run in it goes on."""
        return self.folder if self.resume else None

    @property
    def finished(self) -> Mapping[str, Any] | None:
        """The summary of a run that has nothing left to do, its student whole; or None."""
        file = self.folder / runs.SUMMARY
        if not self.trained or not file.is_file():
            return None
        summary = _read_summary(file)
        if summary.get("steps") != self.first_step:  # of a shorter training, which was gone on with
            return None
        student = self.folder / STUDENT
        whole = holds_model(student) and find_damage(student, summary.get("student", {})) is None
        return summary if whole else None

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder, on the main process: no other run writes into it meanwhile.

        Raises:
            InputError: another process holds it.
        """
        return hold_folder(self.folder) if self.world.is_main else nullcontext()

    def say(self, line: str) -> None:
        """Show a line."""
        self.console.print(line, markup=False)


def _read_summary(file: Path) -> dict[str, Any]:
    """The summary of a run, or nothing where it is damaged: then it is written again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def recall(config: RunConfig) -> RunConfig:
    """A configuration to resume with, with what the run settled when it began.

    Args:
        config: names the run's folder; what it states itself is kept.
    """
    if config.output.dir is None:
        return config
    file = expand_home(config.output.dir) / runs.CONFIG
    if not file.is_file():
        return config
    before = stated_values(file).get("data", {})
    update: dict[str, Any] = {}
    if config.data.date is None and before.get("date") is not None:
        update["date"] = str(before["date"])
    if "hold_out" not in before:  # a run of a version that split rows by their content
        update["hold_out"] = "content"
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def open_folder(config: RunConfig, resume: bool, overwrite: bool, console: Console | None) -> Start:
    """Take the folder of a run, in the same way on all processes.

    Args:
        config: names the folder, the loss and the steps.
        resume: go on from its newest complete checkpoint.
        overwrite: replace the run in it, once nothing can be refused any more.
        console: by default standard error.

    Raises:
        InputError: the folder holds something else, or input of the run that would be removed; or
            the processes do not suit the run.
    """
    world = World(config.training.fsdp)
    folder = Path(world.share(str(runs.choose_folder(config.output.dir, config.loss.spec))))
    if not resume:
        check_keeps_inputs(config, folder)
    if world.is_main:
        runs.prepare_folder(folder, resume, overwrite)
    world.wait()
    console = console or make_console()
    console.quiet = console.quiet or not world.is_main
    found, changes = Found(None, ()), tuple[str, ...]()
    if resume:
        changes = compare_settings(config, folder / runs.CONFIG)
        found = find_checkpoint(folder / runs.CHECKPOINTS)
    _check_kind(found.newest, config.training.fsdp)
    trained = _is_trained(found.newest, config.training)
    return Start(folder, world, console, resume, found.newest, trained, (*found.notes, *changes))


# A resumed optimiser brings its own; others would train on some rows twice, or not fit.
_FIXED = (
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "training.seed",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.dora",
    "loss.spec",
    "procedure.spec",
    "model.dtype",
)
# Folders, what is settled again in the same way, and what has a check of its own.
_NO_SETTINGS = (
    "output.dir",
    "data.cache_dir",
    "data.accept_changes",
    "data.date",
    "loss.chunk_size",
    "loss.compiled",
)


def compare_settings(config: RunConfig, file: Path) -> tuple[str, ...]:
    """Compare the settings to resume with with those that the run has had so far.

    Args:
        config: to resume with.
        file: the configuration that the run has had so far.

    Returns:
        What changes from here on, a line, or nothing.

    Raises:
        InputError: a setting would have no effect, or another one than it says; names the key.
    """
    before = stated_values(file)
    now = config.model_dump(mode="json")
    for key in _FIXED:
        section, _, name = key.partition(".")
        if before.get(section, {}).get(name, now[section][name]) != now[section][name]:
            raise InputError(
                f"--resume: {key} was {before[section][name]!r} when the run began and is "
                f"{now[section][name]!r}; a run keeps it to its end: leave it out, or begin a new "
                f"run from the student (--student {file.parent})"
            )
    _check_step(before.get("training", {}), config.training, file.parent)
    changed = [
        f"{section}.{name} {now[section][name]!r} (was {value!r})"
        for section, content in before.items()
        for name, value in content.items()
        if f"{section}.{name}" not in _NO_SETTINGS
        and now.get(section, {}).get(name, value) != value
    ]
    return (f"from here on: {', '.join(changed)}",) if changed else ()


def _check_step(before: Mapping[str, Any], now: TrainingConfig, folder: Path) -> None:
    """Refuse steps of another number of rows: some would be trained on twice, and others never.

    Fewer processes may take larger batches, and the reverse.
    """
    record = Record.read(folder)
    processes = None if record is None else record.sources.processes
    if processes is None:
        return
    names = ("batch_size", "gradient_accumulation_steps")
    was = [int(before.get(name, getattr(now, name))) for name in names]
    has = [getattr(now, name) for name in names]
    world = World().size
    if math.prod(was) * processes != math.prod(has) * world:
        raise InputError(
            f"--resume: a step had {math.prod(was) * processes} rows when the run began "
            f"(training.batch_size {was[0]}, gradient_accumulation_steps {was[1]}, {processes} "
            f"processes) and has {math.prod(has) * world}; keep the number of rows"
        )


def _is_trained(checkpoint: Path | None, training: TrainingConfig) -> bool:
    if checkpoint is None:
        return False
    return is_last(checkpoint, training.max_steps, training.num_epochs)


def _check_kind(checkpoint: Path | None, fsdp: bool) -> None:
    """Refuse to continue with models spread over processes what began otherwise, or the reverse."""
    if checkpoint is not None and (checkpoint / SHARDS).is_dir() != fsdp:
        was = "without" if fsdp else "with"
        raise InputError(
            f"--resume: {checkpoint} was written {was} training.fsdp=true; continue it likewise"
        )
