"""Records of trials that nobody ran."""

from __future__ import annotations

from typing import Any

from kdrun.compare.record import Arm, Record, Trial


def arm(loss: str | None, kd_ratio: float = 0.5, lr: float = 1e-3, student: str = "s") -> Arm:
    return Arm(loss=loss, kd_ratio=kd_ratio, lr=lr, teacher="builtin", student=student)


BASELINE = arm(None, 0.0)


def record(of: Arm, seed: int, measures: dict[str, float | None] | float, **more: Any) -> Record:
    """A number is the cross-entropy."""
    if isinstance(measures, float):
        measures = {"ce": measures}
    trial = Trial(arm=of, seed=seed, stage=more.pop("stage", "final"))
    more = {"status": "done", **more}
    return Record(id=trial.identity("setting"), trial=trial, measures=measures, **more)


def records_of(values: dict[Arm, list[float]]) -> list[Record]:
    """One record a seed, from cross-entropies."""
    return [
        record(of, seed, value)
        for of, column in values.items()
        for seed, value in enumerate(column)
    ]
