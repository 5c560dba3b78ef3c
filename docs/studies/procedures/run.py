r"""Procedures against plain distillation at equal wall time.

Each arm first trains a few steps to tell how long one takes, its generation included; then it gets
as many steps as fit the budget, so that its learning-rate schedule ends with it. What is written
before the first step (``seqkd``, ``distillm2``) counts too, and is written anew for every run. Arms
take turns, seed by seed, so that a change of the machine's speed meets all of them::

    python docs/studies/procedures/run.py --seconds 120 --seeds 3 --output study
    python docs/studies/procedures/run.py --seconds 900 --seeds 3 --output study-smollm2 \
        --teacher TEACHER --student student-init --data rows.json --answers 50 \
        --set optimizer.lr=3e-4

It writes ``steps.json``, the steps of each arm, and ``results.csv``, a line a run; a second start
takes both as they are and runs what is missing. Means with standard deviations are printed.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrun import distill
from kdrun.config.load import load_config, parse_value
from kdrun.config.sections import RunConfig

ARMS: dict[str, dict[str, Any]] = {
    "plain, cross-entropy alone": {"loss.kd_ratio": 0.0},
    "plain, forward_kl": {"loss.spec": "forward_kl_chunked"},
    "plain, skew_forward_kl": {"loss.spec": "skew_forward_kl_chunked"},
    "gkd, lambda 0.5": {"procedure.spec": "gkd:lambda=0.5", "loss.spec": "forward_kl_chunked"},
    "gkd, lambda 1": {"procedure.spec": "gkd:lambda=1", "loss.spec": "generalized_jsd_chunked"},
    "seqkd": {"procedure.spec": "seqkd"},
    "distillm": {"procedure.spec": "distillm"},
    "minillm": {"procedure.spec": "minillm"},
    "distillm2": {"procedure.spec": "distillm2"},
}
WORDS = ("arm", "began")  # columns that are no numbers
MEASURES = ("ce", "forward_kl", "reverse_kl", "top1_agreement", "rouge_l")


def config_of(
    arm: str, given: argparse.Namespace, seed: int, steps: int, folder: Path, answers: int
) -> RunConfig:
    """The run of an arm."""
    settings: dict[str, Any] = {
        "data.cache_dir": "none",
        "evaluation.answers": answers,
        "training.save_steps": 10**9,
        # Chosen by the length of a run otherwise, which would change the speed between runs.
        "loss.compiled": True,
        **ARMS[arm],
        "training.seed": seed,
        "training.max_steps": steps,
        "output.dir": str(folder),
    }
    for name in ("teacher", "student"):
        if getattr(given, name):
            settings[f"model.{name}"] = getattr(given, name)
    if given.data:
        settings["data.train"] = given.data
    for setting in given.settings:
        key, _, value = setting.partition("=")
        if not key.startswith("procedure.") or "procedure.spec" in settings:
            settings[key] = parse_value(key, value)
    return load_config(None, list(settings.items()))


@dataclass(frozen=True)
class Cost:
    """What a run of some steps took.

    Attributes:
        steps: how many.
        training: seconds of the steps without what they wrote.
        writing: seconds of writing answers, before and in the steps.
        tokens: of these answers.
    """

    steps: int
    training: float
    writing: float
    tokens: int


def run(config: RunConfig) -> tuple[dict[str, Any], Cost]:
    """Train and measure; the summary, and what it took."""
    shutil.rmtree(str(config.output.dir), ignore_errors=True)
    summary = dict(distill(config).summary)
    shutil.rmtree(str(config.output.dir), ignore_errors=True)
    written = summary.get("procedure", {})
    return summary, Cost(
        summary["steps"],
        summary["training_seconds"],
        written.get("generation_seconds", 0.0),
        written.get("generated_tokens", 0),
    )


def steps_within(arm: str, given: argparse.Namespace) -> int:
    """How many steps fit the budget, what is written once told apart from what a step takes.

    Two short runs tell roughly; where they were shorter than a third of the length, one of a third
    tells better: a student that learns writes longer or shorter answers than at first.
    """
    calibrate(arm, given, given.calibrate[0])  # compiles
    costs = [calibrate(arm, given, count) for count in given.calibrate]
    third = fitting(*costs, given.seconds) // 3
    if third > costs[-1].steps:
        costs.append(calibrate(arm, given, third))
    return fitting(*costs[-2:], given.seconds)


def calibrate(arm: str, given: argparse.Namespace, steps: int) -> Cost:
    """What a run of so many steps takes; its answers are not asked for."""
    config = config_of(arm, given, 1000, steps, Path(given.output) / "run", answers=0)
    return run(config)[1]


def fitting(short: Cost, long: Cost, budget: float) -> int:
    """The steps that take the budget, if all that two runs differ in grows with the steps.

    Writing is judged by its tokens, as its seconds would mistake noise for growth.
    """
    more = long.steps - short.steps
    writing = long.writing / long.tokens * (long.tokens - short.tokens) if long.tokens else 0.0
    each = (long.training - short.training + writing) / more
    return max(1, round(long.steps + (budget - long.training - long.writing) / each))


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", required=True)
    parser.add_argument("--arm", dest="arms", action="append", choices=tuple(ARMS))
    parser.add_argument("--teacher")
    parser.add_argument("--student")
    parser.add_argument("--data")
    parser.add_argument("--calibrate", type=int, nargs=2, default=(6, 18), metavar="STEPS")
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    given = parser.parse_args()
    folder = Path(given.output)
    folder.mkdir(parents=True, exist_ok=True)
    arms = given.arms or list(ARMS)
    kept = folder / "steps.json"
    steps: dict[str, int] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    for arm in arms:
        if arm not in steps:
            steps[arm] = steps_within(arm, given)
            kept.write_text(json.dumps(steps, indent=1), encoding="utf-8")
    results = folder / "results.csv"
    rows = read(results)
    ended = {(row["arm"], row["seed"]) for row in rows}
    for seed in range(given.seeds):
        for arm in arms:
            if (arm, seed) in ended:
                continue
            began = time.strftime("%H:%M:%S")
            summary, cost = run(
                config_of(arm, given, seed, steps[arm], folder / "run", given.answers)
            )
            after, written = summary["after"], summary.get("procedure", {})
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "began": began,
                    "steps": summary["steps"],
                    "seconds": round(cost.training + cost.writing, 1),
                    "generation_seconds": round(cost.writing, 1),
                    "generated_tokens": cost.tokens,
                    "phi": written.get("phi", ""),
                    **{name: after.get(f"eval_{name}") for name in MEASURES},
                }
            )
            with open(results, "w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    show(rows, arms)


def read(results: Path) -> list[dict[str, Any]]:
    """The runs that have ended, numbers as numbers."""
    if not results.exists():
        return []
    with open(results, encoding="utf-8", newline="") as stream:
        return [
            {key: cell if key in WORDS else _number(cell) for key, cell in row.items()}
            for row in csv.DictReader(stream)
        ]


def _number(cell: str) -> Any:
    return json.loads(cell) if cell else None


def show(rows: list[dict[str, Any]], arms: list[str]) -> None:
    """Print a Markdown table of means and standard deviations over seeds."""
    columns = ("steps", "seconds", "generated_tokens", *MEASURES)
    print("| arm |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for arm in arms:
        cells = []
        for column in columns:
            found = [row[column] for row in rows if row["arm"] == arm and row[column] is not None]
            if not found:
                cells.append("-")
                continue
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            whole = column in columns[:3]
            mean = statistics.fmean(found)
            cells.append(f"{mean:.0f}" if whole else f"{mean:.3f} ± {spread:.3f}")
        print(f"| {arm} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
