"""What a run depends on besides its configuration: tokenised rows, tokenizer, date, weights.

The record is kept in the run's folder. A resumed run compares itself with it, so that it cannot
continue with different rows or another teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kdrun.cache.fingerprint import TeacherPrint, TokenizerPrint, print_teacher, print_tokenizer
from kdrun.data.mixture import Mixture
from kdrun.data.prepare import examples_in
from kdrun.data.token_store import Tokens, hash_example
from kdrun.errors import InputError
from kdrun.files import write_bytes
from kdrun.losses.build import files_of, files_of_weight
from kdrun.losses.features import files_of_features
from kdrun.models.locate import commit_of
from kdrun.run import folder as runs
from kdrun.run.processes import World
from kdrun.served.probe import differs

if TYPE_CHECKING:
    import numpy as np

    from kdrun.cache.choose import ChosenTeacher
    from kdrun.config.data_section import DataConfig
    from kdrun.config.sections import RunConfig
    from kdrun.data.origins import Origins
    from kdrun.data.prepare import Examples
    from kdrun.run.prepare import Prepared

# Paths, and the treatment of bad rows, do not change the tokens of the remaining rows.
_NOT_THE_TOKENS = {
    "train",
    "eval",
    "test",
    "cache_dir",
    "workers",
    "strict",
    "accept_changes",
    "template",  # the tokenizer's fingerprint has its content
}
_WAYS_OUT = (
    "restore it, start a new run with another --output, or continue anyway with "
    "--set data.accept_changes=true"
)


class Sources(BaseModel):
    """Fingerprints and settings of a run's rows and models.

    Attributes:
        tokenizer: its fingerprint.
        data: the settings that decide how rows are tokenised.
        teacher: fingerprint of its weights; None without one, or in int8.
        student: fingerprint of the student's initial weights.
        processes: number of processes of the run; None if an earlier version did not record it.
        teacher_commit: commit of a teacher on the hub; None of another one.
        student_commit: the same of the student.
        served: log-probabilities of the probe, by which a served teacher is recognised.
        loss_files: SHA-256 of the files of losses that are not registered.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    tokenizer: TokenizerPrint
    data: dict[str, Any]
    teacher: TeacherPrint | None
    student: TeacherPrint | None
    processes: int | None = None
    teacher_commit: str | None = None
    student_commit: str | None = None
    served: tuple[float, ...] | None = None
    loss_files: dict[str, str] = {}


@dataclass(frozen=True)
class Record:
    """The record of a run's input, kept in its folder.

    Attributes:
        sources: what rows and models depend on.
        train: a hash of each training row's tokens and supervised positions.
        held_out: the same for held-out rows.
    """

    sources: Sources
    train: np.ndarray
    held_out: np.ndarray

    def write(self, folder: Path) -> None:
        """Write it to a run's folder atomically."""
        from safetensors.numpy import save

        arrays = {"train": self.train, "held_out": self.held_out}
        metadata = {"sources": self.sources.model_dump_json()}
        write_bytes(folder / runs.INPUTS, save(arrays, metadata=metadata))

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Read the record of a run's folder; None if it is missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(folder / runs.INPUTS, "np") as opened:
                sources = Sources.model_validate_json((opened.metadata() or {})["sources"])
                return cls(sources, opened.get_tensor("train"), opened.get_tensor("held_out"))
        except (OSError, SafetensorError, KeyError, ValidationError):
            return None


def record_of(
    config: RunConfig, prepared: Prepared, teacher: ChosenTeacher, initial: TeacherPrint
) -> Record:
    """Record a run's input, before any step is taken or adapters are trained."""
    pair = prepared.pair
    sources = Sources(
        tokenizer=print_tokenizer(pair.tokenizer),
        data=_settings(config.data),
        teacher=_print_teacher(config, teacher),
        student=initial,
        processes=World().size,
        teacher_commit=None if pair.teacher is None else commit_of(pair.teacher),
        student_commit=commit_of(pair.student),
        served=_probe_of(teacher),
        loss_files=files_of(config.loss.spec)
        | files_of_features(config.features.spec)
        | files_of_weight(config.token_weight.spec),
    )
    examples = prepared.examples
    return Record(sources, _hashes(examples.train), _hashes(examples.held_out))


def check_unchanged(
    config: RunConfig,
    prepared: Prepared,
    teacher: ChosenTeacher,
    initial: TeacherPrint,
    folder: Path | None,
) -> tuple[Record, list[str]]:
    """Compare a run's input with what it began with.

    Args:
        config: of the run.
        prepared: has its rows.
        teacher: what is distilled.
        initial: fingerprint of the student before any step.
        folder: of the run that goes on; None for a new one.

    Returns:
        The record, and the changes that were accepted.

    Raises:
        InputError: the input differs; names the first difference.
    """
    now = record_of(config, prepared, teacher, initial)
    before = None if folder is None else Record.read(folder)
    if before is None:
        return now, []
    changes = list(_changes(before, now, prepared.examples, config.lora.rank is not None))
    if changes and not config.data.accept_changes:
        raise InputError(f"--resume: {changes[0]}; {_WAYS_OUT}")
    return now, changes


def _changes(before: Record, now: Record, examples: Examples, adapters: bool) -> Iterator[str]:
    was, has = before.sources, now.sources
    if was.tokenizer.vocabulary != has.tokenizer.vocabulary:
        yield "the tokenizer has changed since the run began"
    if was.tokenizer.chat_template != has.tokenizer.chat_template:
        yield "the chat template has changed since the run began"
    for name, value in has.data.items():
        if was.data.get(name, value) != value:
            yield f"data.{name} was {was.data[name]!r} when the run began and is {value!r}"
    yield from _changed_rows(before.train, now.train, "training rows", examples.origins)
    yield from _changed_rows(
        before.held_out, now.held_out, "held-out rows", examples.held_out_origins
    )
    if None not in (was.teacher, has.teacher) and was.teacher != has.teacher:
        yield "the teacher's weights have changed since the run began"
    elif None in (was.teacher, has.teacher) and _differ(was.teacher_commit, has.teacher_commit):
        was_at, is_at = was.teacher_commit, has.teacher_commit
        yield f"the teacher was at commit {was_at} when the run began and is at {is_at}"
    if was.served is not None and has.served is not None and differs(was.served, has.served):
        yield "the server has another teacher than when the run began"
    # Trained weights come from the checkpoint, not from the student's folder.
    if adapters and None not in (was.student, has.student) and was.student != has.student:
        yield "the student's base weights have changed since the run began"


def _differ(before: str | None, now: str | None) -> bool:
    return None not in (before, now) and before != now


def _changed_rows(
    before: np.ndarray, now: np.ndarray, kind: str, origins: Origins
) -> Iterator[str]:
    common = min(len(before), len(now))
    different = (before[:common] != now[:common]).nonzero()[0]
    if len(different):
        yield f"{kind}: {origins.name([int(different[0])])} has changed since the run began"
    elif len(before) != len(now):
        yield f"{kind}: there were {len(before)} when the run began, and there are {len(now)}"


def _settings(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(mode="json", exclude=_NOT_THE_TOKENS)


def _print_teacher(config: RunConfig, chosen: ChosenTeacher) -> TeacherPrint | None:
    from kdrun.cache.teacher import CachedTeacher
    from kdrun.models.heads import FrozenTeacher

    teacher = chosen.training
    if isinstance(teacher, CachedTeacher):
        return teacher.cache.manifest.teacher
    # The tensors of torchao have no bytes of their own to hash.
    if isinstance(teacher, FrozenTeacher) and config.model.teacher_quantization != "int8":
        return print_teacher(teacher.model)
    return None


def _probe_of(chosen: ChosenTeacher) -> tuple[float, ...] | None:
    from kdrun.served.teacher import ServedTeacher

    return chosen.training.asked.probe if isinstance(chosen.training, ServedTeacher) else None


def _hashes(examples: Any) -> np.ndarray:
    import numpy as np

    if isinstance(examples, Mixture):
        examples = examples.examples
    if isinstance(examples, Tokens):
        return examples.hashes()
    found = [hash_example(one) for one in examples_in(examples)]
    return np.array(found, dtype=np.int64)
