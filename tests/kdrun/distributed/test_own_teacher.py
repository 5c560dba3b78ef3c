"""A student that teaches itself with another prompt: two processes are one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import kdrun_in_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def train(
    folder: Path,
    pair: Any,
    still: Path,
    processes: int,
    *more: str,
    teacher: str = "self",
    resume: bool = False,
) -> dict[str, Any]:
    run = [
        *(["--resume"] if resume else []),
        *("--teacher", teacher, "--student", still, "--data", pair.rows, "--max-length", "128"),
        *("--max-steps", "4", "--batch-size", str(8 // processes), "--output", folder),
        *(
            "--set",
            "training.save_steps=2",
            "--set",
            "loss.compiled=false",
            "--set",
            "training.logging_steps=1",
        ),
        *("--set", "data.teacher_template=the user asks {prompt} the answer {answer}"),
        *("--set", "data.teacher_max_length=250", "--lr", "1e-2"),
        *(word for key in more for word in ("--set", key)),
    ]
    for done in kdrun_in_processes(processes, *run):
        assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    after = json.loads((folder / "summary.json").read_text("utf-8"))["after"]
    return {**after, "kd": [line["kd_loss"] for line in lines if "kd_loss" in line]}


@pytest.mark.parametrize(
    ("keys", "sharded"),
    [
        (["model.teacher_ema=0.5"], False),
        (["model.teacher_ema=0.5"], True),
        (["lora.rank=2"], True),
        (["model.teacher_ema=0.5", "lora.rank=2"], False),
        ([], True),
    ],
)
def test_two_processes_are_one_run(
    keys: list[str], sharded: bool, tiny_pair: Any, still_student: Path, tmp_path: Path
) -> None:
    one = train(tmp_path / "one", tiny_pair, still_student, 1, *keys)
    spread = [*keys, "training.fsdp=true"] if sharded else keys
    two = train(tmp_path / "two", tiny_pair, still_student, 2, *spread)
    assert set(one) == set(two)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4), name


def test_present_weights_that_are_spread_are_those_of_one_run(
    tiny_pair: Any, still_student: Path, tmp_path: Path
) -> None:
    found = [
        train(
            tmp_path / f"{processes}",
            tiny_pair,
            still_student,
            processes,
            *keys,
            teacher="self:live",
        )
        for processes, keys in ((1, []), (2, ["training.fsdp=true"]))
    ]
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-4), name


def test_a_mean_that_is_spread_resumes(tiny_pair: Any, still_student: Path, tmp_path: Path) -> None:
    keys = ("model.teacher_ema=0.5", "training.fsdp=true")
    whole = train(tmp_path / "run", tiny_pair, still_student, 2, *keys)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    (tmp_path / "run" / "summary.json").unlink()
    again = train(tmp_path / "run", tiny_pair, still_student, 2, *keys, resume=True)
    assert again == whole
