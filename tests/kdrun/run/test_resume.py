"""What a resumed run takes from its folder, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from kdrun.cli import cli
from kdrun.errors import InputError


def test_flags_change_the_runs_own_configuration(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run")
    arguments = ["--resume", "--output", str(folder), "--max-steps", "3"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["student"] == str(tiny_pair.student)
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 3


def test_another_student_is_refused(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run")
    other = {"model__student": str(tiny_pair.teacher), "training__max_steps": 3}
    with pytest.raises(InputError, match="checkpoint-2: its weights have other shapes"):
        distil(folder, resume=True, **other)


def test_more_epochs_go_on_where_the_run_had_ended(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    epochs = {"training__max_steps": None, "training__num_epochs": 1}
    folder = distil(tmp_path / "run", **epochs)
    steps = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"]
    said: list[str] = []
    distil(folder, said, resume=True, **epochs)
    assert said[-1].endswith("is finished; nothing is left to do")
    distil(folder, resume=True, **epochs | {"training__num_epochs": 2})
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2 * steps


def test_a_run_that_gets_longer_follows_its_schedules_from_its_next_step(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    """Two of two steps are all of the way, two of four are half of it."""
    moves = {"loss__schedules": {"kd_ratio": {"kind": "linear", "start": 0.1, "end": 0.9}}}
    folder = distil(tmp_path / "run", **moves)
    distil(folder, resume=True, training__max_steps=4, **moves)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ratios = [line["kd_ratio"] for line in map(json.loads, lines) if "kd_ratio" in line]
    assert ratios == pytest.approx([0.1, 0.5, 0.5, 0.7])


def test_a_run_killed_before_its_first_checkpoint_repeats_itself(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    """Its dropout does not depend on whether the first evaluation was made again."""
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    config = json.loads((student / "config.json").read_text(encoding="utf-8"))
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    given = {"model__student": str(student)}
    whole = distil(tmp_path / "whole", **given)
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / "checkpoints" / "checkpoint-2")
    distil(killed, resume=True, **given)
    ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (killed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_loss_is_refused(distil: Callable[..., Path], tmp_path: Path) -> None:
    folder = distil(tmp_path / "run")
    other = {"loss__spec": "reverse_kl_chunked", "training__max_steps": 3}
    with pytest.raises(InputError, match=r"loss\.spec was 'forward_kl_chunked' when"):
        distil(folder, resume=True, **other)
