"""What a comparison consists of: arms, trials and their records. Plain data, no behaviour."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["done", "diverged", "failed"]
Stage = Literal["tuning", "final"]
Pair = tuple[str, str]
"""A teacher and an initial student, as they were given."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Data):
    """What is compared: all that differs between two columns of the comparison but the seed.

    Attributes:
        loss: the spec of the loss; None trains on cross-entropy alone (``kd_ratio`` 0).
        kd_ratio: weight of the loss.
        lr: highest learning rate.
        teacher: folder, hub id, or ``"builtin"``.
        student: the initial student.
        procedure: whose text is learned from; None is the data's.
    """

    loss: str | None
    kd_ratio: float
    lr: float
    teacher: str
    student: str
    procedure: str | None = None

    @property
    def method(self) -> str:
        """The loss, or ``cross-entropy``."""
        return "cross-entropy" if self.loss is None else self.loss

    @property
    def plain(self) -> bool:
        """Cross-entropy alone on the data: what everything is compared with."""
        return self.loss is None and self.procedure is None

    @property
    def pair(self) -> Pair:
        """Teacher and student."""
        return self.teacher, self.student


class Trial(_Data):
    """One training run of a comparison.

    Attributes:
        arm: what is trained.
        seed: varies the order of rows and dropout.
        stage: ``"tuning"`` chooses learning rate and ratio on validation rows; ``"final"`` is
            measured on test rows.
    """

    arm: Arm
    seed: int
    stage: Stage = "final"

    def identity(self, setting: str) -> str:
        """A short name that follows from the trial and the setting that all trials share.

        Defaults are left out, so that an axis of a later version renames no earlier trial.
        """
        content = json.dumps([self.model_dump(exclude_defaults=True), setting], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Record(_Data):
    """A trial that has ended, as the ledger keeps it.

    Attributes:
        id: :meth:`Trial.identity`.
        trial: what was run.
        status: ``"diverged"`` where the loss or a measure became NaN or infinite.
        reason: one line, where the status is not ``"done"``.
        measures: of the trained student on the held-out rows, by the names of
            the yardsticks; None where a yardstick does not apply. Empty where not done.
        curves: lines of the training log, with ``step`` and what was logged at it.
        supervised_tokens_per_second: of training alone.
        peak_memory_mib: of the process.
        seconds: of the whole trial.
        generated_tokens: written by student and teacher in it.
        command: the command that repeats this trial alone.
        versions: of Python and packages.
        hardware: processor, cores, memory, accelerator.
        checksum: of all the rest, from the ledger; None in folders of earlier versions.
    """

    id: str
    trial: Trial
    status: Status
    reason: str | None = None
    measures: dict[str, float | None] = Field(default_factory=dict)
    curves: list[dict[str, Any]] = Field(default_factory=list)
    supervised_tokens_per_second: float = 0.0
    peak_memory_mib: int = 0
    seconds: float = 0.0
    generated_tokens: int = 0
    command: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, str] = Field(default_factory=dict)
    checksum: str | None = None

    def digest(self) -> str:
        """What :attr:`checksum` has to be.

        Defaults are left out, so that a field of a later version changes no earlier record.
        """
        # Through JSON, which has no NaN: a record that was read is the one that was written.
        text = self.model_dump_json(exclude={"checksum"}, exclude_defaults=True)
        content = json.dumps(json.loads(text), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
