"""Records of trials that nobody ran."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kdrun.compare.record import Arm, Record, Trial
from kdrun.compare.report import ReportInput
from kdrun.evaluation.yardsticks import YARDSTICKS


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


HOSTILE = "<script>alert(1)</script>"
COMPARED = {
    # cross-entropy against the baseline, its noise, KL to the teacher, tokens a second
    arm(None, 0.0): (0.0, 0.0, 0.95, 2100),
    arm("forward_kl_chunked"): (-0.045, 0.004, 0.70, 1660),
    arm("reverse_kl_chunked"): (-0.003, 0.002, 0.74, 1640),
    arm("generalized_jsd_chunked:beta=0.1"): (-0.012, 0.016, 0.79, 1580),
    arm("alpha_beta_chunked:alpha=0.2,beta=0.7"): (0.060, 0.006, 0.83, 1510),
}


def comparison(seeds: int = 5, *, hostile: bool = False) -> ReportInput:
    """A comparison with every verdict, a diverged trial, a failed one and two that wait."""
    rng = np.random.default_rng(7)
    arms = dict(COMPARED)
    if hostile:
        arms |= {
            arm(name): (0.02 * place, 0.005, 0.8, 1500)
            for place, name in enumerate([HOSTILE, "=1+1", "_private_50%&$x$#{a}^~\\", "a\nb|c"])
        }
    records = []
    base = 3.61 + rng.normal(0, 0.02, seeds)
    for of, (shift, noise, kl, speed) in arms.items():
        for seed in range(seeds):
            ce = float(base[seed] + shift + rng.normal(0, noise))
            records.append(_trained(of, seed, ce, kl + float(rng.normal(0, 0.01)), speed, rng))
    unstable, twin, waiting = arm("pearson"), arm("my_forward_kl"), arm("taid_chunked")
    for seed in range(seeds):
        diverged = seed == 1
        records.append(
            record(
                unstable,
                seed,
                {} if diverged else {"ce": 3.5 + 0.01 * seed},
                status="diverged" if diverged else "done",
                reason="the loss is nan at step 12 <b>" if diverged else None,
                command="kdrun --loss pearson",
            )
        )
        records.append(record(twin, seed, float(base[seed])))
    records.append(record(waiting, 0, {}, status="failed", reason="out of memory"))
    planned = [Trial(arm=of, seed=seed) for of in [*arms, unstable] for seed in range(seeds)]
    planned += [Trial(arm=waiting, seed=seed) for seed in range(3)]
    return ReportInput(
        title="Losses on the built-in pair" + (f" {HOSTILE}" if hostile else ""),
        records=records,
        trials=planned,
        baseline=BASELINE,
        yardstick=YARDSTICKS[0],
        difference=0.02,
        references={
            "untrained student": {"ce": 7.62, "forward_kl": 4.91, "top1_agreement": 0.02},
            "teacher": {"ce": 3.352, "forward_kl": 0.0, "top1_agreement": 1.0},
        },
        notes=[f"A note about {HOSTILE}."] if hostile else ["Test rows: a third by content hash."],
    )


def _trained(
    of: Arm, seed: int, ce: float, kl: float, speed: float, rng: np.random.Generator
) -> Record:
    steps = range(0, 401, 20)
    fade = [math.exp(-step / 90) for step in steps]
    curves: list[dict[str, Any]] = []
    for step, left in zip(steps, fade, strict=True):
        curves.append({"step": step, "eval_ce": ce + 4 * left + 0.3 * (1 - left) * left})
        if step:
            curves.append(
                {
                    "step": step,
                    "class_loss": ce - 0.1 + 4 * left + float(rng.normal(0, 0.05)),
                    "kd_loss": None
                    if of.loss is None
                    else kl + 3 * left + float(rng.normal(0, 0.03)),
                }
            )
    return record(
        of,
        seed,
        {
            "ce": ce,
            "forward_kl": kl,
            "reverse_kl": 1.2 * kl,
            "top1_agreement": 0.62 - 0.1 * kl,
            "calibration_error": 0.031,
            "rouge_l": 0.18 + seed / 300,
            "exact_match": None,
        },
        curves=curves,
        supervised_tokens_per_second=speed + float(rng.normal(0, 20)),
        peak_memory_mib=1400,
        seconds=61.5,
        command=f"kdrun --loss {of.method} --kd-ratio {of.kd_ratio:g} --seed {seed}",
        versions={"python": "3.11.2", "torch": "2.13.0", "kdlosses": "0.1.0"},
        hardware={"processor": "AMD EPYC", "cores": "2", "memory": "16 GiB"},
    )
