"""The student of the best evaluation, and early stopping."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from commands import kdrun_in_processes
from cut_runs import cut_back
from safetensors.torch import load_file

from kdrun.cli import cli
from kdrun.errors import InputError

# A rate at which the student soon gets worse.
WORSE = {
    "optimizer__lr": 0.05,
    "optimizer__scheduler": "constant",
    "training__max_steps": 16,
    "training__eval_steps": 2,
    "training__keep_best": "eval_ce",
    "training__save_steps": 5,
}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def evaluated(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["eval_ce"] for line in lines if "eval_ce" in line and line["step"]}


def student_of(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def test_the_student_is_that_of_the_best_evaluation(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    said: list[str] = []
    folder = distil(tmp_path / "run", said, **WORSE)
    found = evaluated(folder)
    best = min(found, key=lambda step: found[step])
    assert best < 16
    summary = summary_of(folder)
    assert (summary["steps"], summary["student_step"]) == (16, best)
    assert summary["after"]["eval_ce"] == found[best]
    kept = load_file(folder / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    for name, weight in load_file(folder / "student" / "model.safetensors").items():
        assert torch.equal(weight, kept[name]), name
    assert any(f"of step {best} of 16, the best by eval_ce" in line for line in said)
    distil(folder, said, resume=True, **WORSE)
    assert said[-1].endswith("is finished; nothing is left to do")


def test_the_student_evaluates_as_the_summary_says(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", **WORSE, data__eval=str(tiny_pair.rows))
    out = tmp_path / "measures.json"
    arguments = ["evaluate", str(folder / "student"), "--data", str(tiny_pair.rows)]
    arguments += ["--max-length", "128", "--output", str(out)]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (measured,) = json.loads(out.read_text(encoding="utf-8"))["models"]
    assert measured["ce"] == pytest.approx(summary_of(folder)["after"]["eval_ce"], rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"lora__rank": 2}], ids=["full", "adapters"])
def test_training_stops_early_and_a_resumed_run_stops_at_the_same_step(
    distil: Callable[..., Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    given = WORSE | {"training__early_stopping": 2, "training__max_steps": 40, **more}
    whole = distil(tmp_path / "whole", **given)
    stopped = summary_of(whole)["steps"]
    assert stopped < 40
    said: list[str] = []
    distil(whole, said, resume=True, **given)
    assert said[-1].endswith("is finished; nothing is left to do")
    cut = cut_back(whole, tmp_path / "cut")
    distil(cut, resume=True, **given)
    assert summary_of(cut)["steps"] == stopped
    assert summary_of(cut)["student_step"] == summary_of(whole)["student_step"]
    names = [path.name for path in (whole / "student").glob("*.safetensors")]
    for name in names:
        assert (cut / "student" / name).read_bytes() == (whole / "student" / name).read_bytes()


def test_a_run_that_lost_its_student_gets_the_best_again(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", **WORSE)
    before, step = student_of(folder), summary_of(folder)["student_step"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    shutil.rmtree(moved / "student")
    distil(moved, resume=True, **WORSE)
    assert student_of(moved) == before
    assert summary_of(moved)["student_step"] == step


def test_a_moved_run_keeps_its_best_checkpoint_when_it_goes_on(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    given = WORSE | {"optimizer__lr": 0.1, "training__max_steps": 14}
    folder = distil(tmp_path / "run", **given)
    step = summary_of(folder)["student_step"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    distil(moved, resume=True, **given | {"training__max_steps": 16})
    assert summary_of(moved)["student_step"] == step
    assert (moved / "checkpoints" / f"checkpoint-{step}" / "complete").is_file()


def test_a_damaged_best_checkpoint_is_told_and_the_last_student_taken(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", **WORSE)
    step = summary_of(folder)["student_step"]
    with open(folder / "checkpoints" / f"checkpoint-{step}" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    shutil.rmtree(folder / "student")
    said: list[str] = []
    distil(folder, said, resume=True, **WORSE)
    assert any(f"the best, checkpoint-{step}, cannot be used" in line for line in said)
    assert summary_of(folder)["student_step"] == 16


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["keep_best=eval_ce"], "needs evaluations in training; set training.eval_steps"),
        (["keep_best=eval_rouge", "eval_steps=1"], "training.keep_best='eval_rouge'"),
        (["early_stopping=2"], "training.early_stopping has no effect without training.keep_best"),
        (
            ["smallest_gain=0.1", "keep_best=eval_ce", "eval_steps=1"],
            "training.smallest_gain has no effect without training.early_stopping",
        ),
        (["keep_best=eval_forward_kl", "eval_steps=1"], "compares with the whole teacher"),
    ],
)
def test_wrong_settings_are_one_line(settings: list[str], line: str, tmp_path: Path) -> None:
    words = [word for one in settings for word in ("--set", f"training.{one}")]
    words += ["--kd-ratio", "0", "--teacher", "none", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, words)
    assert isinstance(done.exception, InputError)
    assert line in str(done.exception)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("fsdp", ["false", "true"], ids=["ddp", "fsdp"])
def test_two_processes_keep_the_same_student(tiny_pair: Any, tmp_path: Path, fsdp: str) -> None:
    arguments = [
        *("--teacher", tiny_pair.teacher, "--student", tiny_pair.student),
        *("--data", tiny_pair.rows, "--max-length", 128, "--max-steps", 16, "--lr", 0.05),
        *("--batch-size", 4, "--set", "optimizer.scheduler=constant"),
        *("--set", "training.eval_steps=2", "--set", "training.keep_best=eval_ce"),
        *("--set", "training.save_steps=5", "--set", "loss.compiled=false"),
        *("--set", f"training.fsdp={fsdp}", "--output", tmp_path / "two"),
    ]
    for done in kdrun_in_processes(2, *arguments):
        assert done.returncode == 0, done.stderr[-3000:]
    summary, found = summary_of(tmp_path / "two"), evaluated(tmp_path / "two")
    step = summary["student_step"]
    assert step == min(found, key=lambda one: found[one])
    assert summary["after"]["eval_ce"] == found[step]


def test_a_measure_of_the_teacher_needs_a_cache_that_is_exact(
    tiny_pair: Any, distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    arguments = ["cache-teacher", "--teacher", tiny_pair.teacher, "--student", tiny_pair.student]
    arguments += ["--data", tiny_pair.rows, "--max-length", 128, "--kind", "top-k", "--k", 4]
    done = CliRunner().invoke(cli, [*map(str, arguments), "--output", str(folder)])
    assert done.exit_code == 0, done.output
    given = WORSE | {"training__keep_best": "eval_forward_kl", "model__teacher": None}
    with pytest.raises(InputError, match="compares with the whole teacher"):
        distil(tmp_path / "run", **given, model__teacher_cache=str(folder))
