"""Where a run takes place: its folder, its processes, and the checkpoint it resumes from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.config.load import stated_values
from kdrun.errors import InputError
from kdrun.files import find_damage, hold_folder
from kdrun.losses.build import changed_file, files_of, files_of_weight
from kdrun.losses.features import files_of_features
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

    from kdrun.config.sections import RunConfig
    from kdrun.config.training_sections import TrainingConfig


@dataclass(frozen=True)
class Start:
    """Where a run takes place and where it begins.

    Attributes:
        folder: folder of the run.
        world: its processes.
        console: displays progress; silent except on the main process.
        resume: whether it continues the run in its folder.
        checkpoint: checkpoint to resume from; None starts from the beginning.
        trained: whether the checkpoint is from the last step.
        notes: lines about unusable checkpoints and changed settings.
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
        """Number of optimiser steps already done."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def begun(self) -> Path | None:
        """The folder, if the run in it goes on."""
        return self.folder if self.resume else None

    def read_summary(self) -> Mapping[str, Any] | None:
        """Return the summary of a finished run with a complete student; None otherwise.

        Reads the student's files to check them.
        """
        file = self.folder / runs.SUMMARY
        if not self.trained or not file.is_file():
            return None
        summary = _read_summary(file)
        if summary.get("steps") != self.first_step:  # from a shorter training that was continued
            return None
        student = self.folder / STUDENT
        whole = holds_model(student) and find_damage(student, summary.get("student", {})) is None
        return summary if whole else None

    def say(self, line: str) -> None:
        """Show a line."""
        self.console.print(line, markup=False)


def _read_summary(file: Path) -> dict[str, Any]:
    """Read the summary of a run; empty if it is damaged, so that it is written again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def recall(config: RunConfig) -> RunConfig:
    """Return a configuration to resume with, including the run's automatic choices.

    Args:
        config: names the run's folder; its explicit settings are kept.
    """
    if config.output.dir is None:
        return config
    file = expand_home(config.output.dir) / runs.CONFIG
    if not file.is_file():
        return config
    before = stated_values(file)
    update: dict[str, Any] = {}
    for section, name, former in _AUTOMATIC:
        chosen = before.get(section, {}).get(name, former)
        own = getattr(config, section)
        if getattr(own, name) is None and chosen is not None:
            # YAML parses a date itself.
            update.setdefault(section, {})[name] = str(chosen)
    if "hold_out" not in before.get("data", {}):
        # A run from a version that split rows by their content.
        update.setdefault("data", {})["hold_out"] = "content"
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values)
            for section, values in update.items()
        }
    )


# Choices that a run makes once, and what versions that did not record them did.
_AUTOMATIC = (
    ("data", "date", None),
    ("training", "precision", "float32"),
    ("model", "student_dtype", "float32"),
    ("model", "teacher_dtype", "float32"),
    ("output", "dtype", None),
)


@contextmanager
def open_folder(
    config: RunConfig, resume: bool, overwrite: bool, console: Console | None
) -> Iterator[Start]:
    """Open the folder of a run, consistently on all processes, and lock it for the duration.

    Args:
        config: names the folder, the loss and the steps.
        resume: continue from its newest complete checkpoint.
        overwrite: replace the run in it, after all checks have passed.
        console: console for progress; by default standard error.

    Raises:
        InputError: the folder has other contents, contains input that would be removed, or is in
            use by another run; or the processes do not suit the run.
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
    with hold_folder(folder) if world.is_main else nullcontext():
        found, changes = Found(None, ()), tuple[str, ...]()
        if resume:
            changes = compare_settings(config, folder / runs.CONFIG)
            found = find_checkpoint(folder / runs.CHECKPOINTS)
        _check_kind(found.newest, config.training.fsdp)
        trained = _is_trained(found.newest, config.training)
        notes = (*found.notes, *changes)
        yield Start(folder, world, console, resume, found.newest, trained, notes)


# The checkpoint's optimiser keeps its own values; other changes would repeat rows or not fit.
_FIXED = (
    "optimizer.name",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "training.seed",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.target_modules",
    "lora.dora",
    "lora.quantization",
    "loss.spec",
    "token_weight.spec",
    "token_weight.on",
    "token_weight.normalize",
    "procedure.spec",
    "features.spec",
    "model.student_dtype",
    "model.teacher_dtype",
    "training.precision",
    "trainer.train_sampling_strategy",
)
# Folders, settings that are derived again identically, and those checked elsewhere.
_NO_SETTINGS = (
    "output.dir",
    "data.cache_dir",
    "data.accept_changes",
    "data.date",
    "loss.chunk_size",
    "loss.compiled",
)


def compare_settings(config: RunConfig, file: Path) -> tuple[str, ...]:
    """Compare the settings to resume with to those of the run so far.

    Args:
        config: configuration to resume with.
        file: configuration of the run so far.

    Returns:
        At most one line, which lists the changed settings.

    Raises:
        InputError: a setting would have no effect or a different one; names the key.
    """
    before = stated_values(file)
    now = config.model_dump(mode="json")
    for key in _FIXED:
        section, _, name = key.partition(".")
        value = now[section].get(name)
        if before.get(section, {}).get(name, value) != value:
            raise InputError(
                f"--resume: {key} was {before[section][name]!r} when the run began and is "
                f"{value!r}; it cannot change during a run: restore it, or start a "
                f"new run from the student (--student {file.parent})"
            )
    for spec, files in (
        (config.loss.spec, files_of(config.loss.spec)),
        (config.features.spec, files_of_features(config.features.spec)),
        (config.token_weight.spec, files_of_weight(config.token_weight.spec)),
    ):
        _check_loss_files(str(spec), files, file.parent)
    _check_step(before.get("training", {}), config.training, file.parent)
    changed = [
        f"{section}.{name} {now[section][name]!r} (was {value!r})"
        for section, content in before.items()
        for name, value in content.items()
        if f"{section}.{name}" not in _NO_SETTINGS
        and now.get(section, {}).get(name, value) != value
    ]
    return (f"changed from here on: {', '.join(changed)}",) if changed else ()


def _check_loss_files(spec: str, files: Mapping[str, str], folder: Path) -> None:
    """Refuse a loss whose file was edited, because it is another loss."""
    record = Record.read(folder)
    changed = None if record is None else changed_file(record.sources.loss_files, files)
    if changed is not None:
        raise InputError(
            f"--resume: {changed} was changed after the run began, so {spec} is another loss; "
            f"restore the file, or start a new run from the student (--student {folder})"
        )


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
    return is_last(checkpoint, training)


def _check_kind(checkpoint: Path | None, fsdp: bool) -> None:
    """Refuse to resume with sharded models a run that began without them, or the reverse."""
    if checkpoint is not None and (checkpoint / SHARDS).is_dir() != fsdp:
        was = "without" if fsdp else "with"
        raise InputError(
            f"--resume: {checkpoint} was written {was} training.fsdp=true; resume it the same way"
        )
