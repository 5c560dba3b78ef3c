"""One trial: its configuration, its run, and its record."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrun.compare.plan import Part
from kdrun.compare.record import Record, Trial
from kdrun.config.features_section import FeaturesConfig
from kdrun.config.sections import LossConfig, ProcedureConfig, RunConfig
from kdrun.errors import InputError, Interrupted, TrainingError
from kdrun.files import remove
from kdrun.losses.build import files_of, files_of_weight
from kdrun.losses.features import files_of_features
from kdrun.models.locate import STUDENT
from kdrun.run import folder as runs

_LARGE = (STUDENT, runs.CHECKPOINTS, runs.ADAPTER, runs.BASE)


def trial_config(
    base: RunConfig, trial: Trial, folder: Path, part: Part, cache: Path | None
) -> RunConfig:
    """The configuration of a trial: the shared settings with those that the trial varies.

    Args:
        base: the settings shared by all trials.
        trial: the trial.
        folder: the run folder.
        part: the part of the held-out rows to evaluate on.
        cache: exact cache of the teacher for all rows of the trial, used instead of the teacher.
    """
    arm = trial.arm
    teacher: dict[str, Any] = {"teacher": arm.teacher}
    if cache is not None:
        teacher = {"teacher": None, "teacher_cache": str(cache)}
    varied: dict[str, dict[str, Any]] = {
        "model": {"student": arm.student, **teacher},
        "loss": {"spec": arm.loss, "kd_ratio": arm.kd_ratio},
        "optimizer": {"lr": arm.lr},
        "training": {"seed": trial.seed},
        "data": {"part": part},
        "output": {"dir": str(folder)},
        "procedure": {"spec": arm.procedure},
    }
    if arm.loss is None:
        # A run needs a loss even with weight 0; the schedules of the other arms do not apply to it.
        varied["loss"] |= {"spec": LossConfig().spec, "schedules": {}}
        # Cross-entropy alone learns nothing from the teacher, its hidden states included.
        base = base.model_copy(update={"features": FeaturesConfig()})
    if arm.procedure is None:
        base = base.model_copy(update={"procedure": ProcedureConfig()})
    else:
        _fill_in(varied, arm.procedure, base)
    sections = {
        name: getattr(base, name).model_copy(update=values) for name, values in varied.items()
    }
    return base.model_copy(update=sections)


def _fill_in(varied: dict[str, dict[str, Any]], spec: str, base: RunConfig) -> None:
    """Add the defaults of a procedure for keys that neither the axes nor the user set."""
    from kdrun.procedures.registry import get_procedure

    for key, value in get_procedure(spec).defaults.items():
        section, _, name = key.partition(".")
        if section != "loss" and name not in getattr(base, section).model_fields_set:
            varied.setdefault(section, {})[name] = value


def run_trial(trial: Trial, identity: str, config: RunConfig, keep_student: bool) -> Record:
    """Run a trial and return its record, including for failures.

    Args:
        trial: the trial to run.
        identity: name of its record.
        config: from :func:`trial_config`.
        keep_student: keep the weights of the student in addition to the log.

    Returns:
        The record. A loss that is not finite, running out of memory and any other failure of the
        training itself are recorded.

    Raises:
        InputError: the input is wrong, which is not a result of the trial.
        OSError: a file cannot be written, which is not a result either.
        Interrupted: interrupted by Ctrl-C; the trial is removed without a record and runs again.
    """
    from kdrun.run.distill import distill

    forget_peak_memory()
    folder = Path(str(config.output.dir))
    remove(folder)  # files of a killed attempt
    started = time.monotonic()
    known: dict[str, Any] = {
        "id": identity,
        "trial": trial,
        "command": f"kdrun --config {folder / runs.CONFIG} --output NEW-FOLDER",
        "hardware": hardware(),
        "loss_files": {}
        if trial.arm.loss is None
        else files_of(trial.arm.loss)
        | files_of_features(config.features.spec)
        | files_of_weight(config.token_weight.spec),
    }
    try:
        summary = distill(config, console=quiet_console()).summary
    except (Interrupted, KeyboardInterrupt):
        remove(folder)
        raise
    except (InputError, OSError):
        raise
    except Exception as error:
        status = "diverged" if isinstance(error, TrainingError) else "failed"
        return Record(
            **known,
            status=status,
            reason=_one_line(error),
            curves=_curves(folder),
            seconds=round(time.monotonic() - started, 2),
        )
    finally:
        if not keep_student:
            for name in _LARGE:
                remove(folder / name)
    measures = {key.removeprefix("eval_"): value for key, value in summary["after"].items()}
    wrong = [name for name, x in measures.items() if x is not None and not math.isfinite(x)]
    return Record(
        **known,
        status="diverged" if wrong else "done",
        reason=f"not finite after training: {', '.join(wrong)}" if wrong else None,
        measures={name: None if name in wrong else x for name, x in measures.items()},
        curves=_curves(folder),
        supervised_tokens_per_second=summary["supervised_tokens_per_second"],
        peak_memory_mib=summary["peak_memory_mib"],
        seconds=round(time.monotonic() - started, 2),
        generated_tokens=summary.get("procedure", {}).get("generated_tokens", 0),
        versions=summary["versions"],
    )


def forget_peak_memory() -> None:
    """Reset the peak memory if the system supports it, so that each trial has its own peak."""
    import torch

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def quiet_console() -> Any:
    """A console that prints nothing, because a comparison has its own display."""
    from rich.console import Console

    return Console(quiet=True)


def hardware() -> dict[str, str]:
    """Processor, cores, memory, accelerator."""
    import torch

    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _curves(folder: Path) -> list[Mapping[str, Any]]:
    path = folder / runs.METRICS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, TrainingError) else f"{type(error).__name__}: {text}"
