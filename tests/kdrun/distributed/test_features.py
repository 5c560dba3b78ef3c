"""Two processes with a term on hidden states: one run, resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import kdrun, kdrun_in_processes
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = [
    *("--features", "hidden_mse:layers=uniform,weight=0.2", "--max-steps", "4"),
    *("--set", "training.save_steps=2", "--set", "training.logging_steps=1"),
    *("--set", "loss.compiled=false", "--set", "loss.chunk_size=64"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    done = kdrun(*RUN, "--batch-size", 4, "--output", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def results(folder: Path) -> tuple[bytes, bytes]:
    projectors = folder / "checkpoints" / "checkpoint-4" / "projectors.pt"
    student = folder / "student" / "model.safetensors"
    return student.read_bytes(), projectors.read_bytes()


@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_two_processes_are_one_run_and_go_on_with_the_same_bits(
    one: Path, tmp_path: Path, fsdp: str
) -> None:
    folder = tmp_path / "run"
    given = [*RUN, "--batch-size", 2, "--set", f"training.fsdp={fsdp}", "--output", folder]
    for done in kdrun_in_processes(2, *given):
        assert done.returncode == 0, done.stderr[-3000:]
    before = results(folder)
    weights, others = (load_file(each / "student" / "model.safetensors") for each in (one, folder))
    for name, weight in weights.items():
        assert (others[name] - weight).abs().max() <= 1e-5, name
    saved, also = (
        torch.load(each / "checkpoints" / "checkpoint-4" / "projectors.pt", weights_only=True)
        for each in (one, folder)
    )
    assert saved["weights"]
    for weight, other in zip(saved["weights"], also["weights"], strict=True):
        assert (weight - other).abs().max() <= 1e-5
    logged, found = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text("utf-8").splitlines()]
        for each in (one, folder)
    )
    for line, same in zip(logged, found, strict=True):
        if "loss" in line:
            assert same["feature_loss"] == pytest.approx(line["feature_loss"], rel=1e-5)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    shutil.rmtree(folder / "student")
    (folder / "summary.json").unlink()
    for done in kdrun_in_processes(2, *given, "--resume"):
        assert done.returncode == 0, done.stderr[-3000:]
    assert results(folder) == before
