"""Checkpoints and students that are damaged after they were written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.errors import InputError
from kdrun.files import hold_folder

Distil = Callable[..., Path]
# At a constant rate a run that is gone on with equals one that was longer from the start.
STEPS = {
    "training__save_steps": 2,
    "training__max_steps": 4,
    "optimizer__scheduler": "constant",
}


@pytest.fixture(scope="module")
def whole(distil: Distil, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, of which a checkpoint was kept every two."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    return distil(folder, **{**STEPS, "training__max_steps": 6})


@pytest.fixture
def run(distil: Distil, tmp_path: Path) -> Path:
    return distil(tmp_path / "run", **STEPS)


def student(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_folder_in_use_is_refused_before_anything_in_it_is_read(
    run: Path, distil: Distil
) -> None:
    flip(run / "checkpoints" / "checkpoint-4" / "model.safetensors")
    with hold_folder(run), pytest.raises(InputError, match="is in use by process"):
        distil(run, resume=True, **{**STEPS, "optimizer__lr": 1.0})


NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "objective.json")


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", [*NAMES, "trainer_state.json"])
def test_f9_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run: Path, whole: Path, distil: Distil, harm: Callable[[Path], None], name: str
) -> None:
    harm(run / "checkpoints" / "checkpoint-4" / name)
    said: list[str] = []
    distil(run, said, resume=True, **{**STEPS, "training__max_steps": 6})
    (line,) = [line for line in said if line.startswith("checkpoint-4 is damaged and skipped")]
    assert name in line
    assert student(run) == student(whole)


def test_without_a_whole_checkpoint_nothing_is_begun(run: Path, distil: Distil) -> None:
    for path in (run / "checkpoints").glob("checkpoint-*/optimizer.pt"):
        cut(path)
    with pytest.raises(InputError, match=r"no checkpoint is complete .*checkpoint-4 is damaged"):
        distil(run, resume=True, **{**STEPS, "training__max_steps": 6})


@pytest.mark.parametrize("harm", ["removed", "cut", "emptied"])
def test_a_run_is_finished_only_with_its_student_whole(
    run: Path, distil: Distil, harm: str
) -> None:
    expected = student(run)
    if harm == "cut":
        cut(run / "student" / "model.safetensors")
    else:
        shutil.rmtree(run / "student")
    if harm == "emptied":
        (run / "student").mkdir()
    said: list[str] = []
    distil(run, said, resume=True, **STEPS)
    assert student(run) == expected
    said.clear()
    distil(run, said, resume=True, **STEPS)
    assert said == [f"the run in {run} is finished; nothing is left to do"]


def test_the_summary_of_a_shorter_training_ends_no_longer_one(
    run: Path, whole: Path, distil: Distil
) -> None:
    """As a kill between the last checkpoint and the summary of a run that was gone on with."""
    before: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    kept = shutil.copytree(run / "student", run.parent / "kept")
    longer = {**STEPS, "training__max_steps": 6}
    distil(run, resume=True, **longer)
    shutil.rmtree(run / "student")
    kept.rename(run / "student")
    (run / "summary.json").write_text(json.dumps(before), encoding="utf-8")
    distil(run, resume=True, **longer)
    assert student(run) == student(whole)
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"] == 6


def test_f10_a_clock_that_jumps_back_removes_no_new_checkpoint(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    folder = distil(tmp_path / "run", **{**STEPS, "training__max_steps": 2})
    future = 4e9
    os.utime(folder / "checkpoints" / "checkpoint-2", (future, future))
    limit = {"training__save_total_limit": 1}
    distil(folder, resume=True, **{**STEPS, **limit})
    names = {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}
    assert names == {"checkpoint-4"}
