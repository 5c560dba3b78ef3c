"""Losses, gradients and measures of several gloo processes equal those of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import worker
from commands import script_in_processes
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    worker.make(folder / "student-tied", True, 1)
    worker.make(folder / "student-untied", False, 2)
    worker.make(folder / "teacher", True, 3)
    worker.make(folder / "wide", True, 4, width=24)
    for processes in (1, 2, 4):
        for done in script_in_processes(processes, worker.__file__, folder):
            assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_all_processes_agree_on_a_step_whose_loss_is_not_finite_on_one(
    results: Path, kind: str
) -> None:
    for processes in (1, 2, 4):
        files = [results / f"guard-{kind}-{processes}-{rank}.json" for rank in range(processes)]
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        assert all(one == found[0] for one in found)
        assert found[0]["skipped"] == 1
        assert found[0]["untouched"]
        assert "nan at step 1" in found[0]["said"]
        assert "training rows 0 (counted" in found[0]["said"]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", worker.CASES, ids=lambda case: case.name)
def test_r3_processes_equal_one(results: Path, case: worker.Case, processes: int) -> None:
    one, several = (
        load_file(results / f"{case.name}-{number}.safetensors") for number in (1, processes)
    )
    # A tied head has a name of its own where it is sharded.
    assert set(one) <= set(several)
    for name, expected in one.items():
        assert (several[name] - expected).abs().max() <= 1e-6, name
    before = load_file(results / "student-tied" / "model.safetensors")
    if not case.lora and case.tied:
        assert (
            one["lm_head.weight" if "lm_head.weight" in one else "model.embed_tokens.weight"]
            - before["model.embed_tokens.weight"]
        ).abs().max() > 1e-3
    if case.features and not case.features.startswith("token_relation"):
        first = worker.projecting(case.features).projectors[0]
        assert (one["projector 0"] - first).abs().max() > 1e-3
    logged, others = (
        json.loads((results / f"{case.name}-{number}.json").read_text(encoding="utf-8"))
        for number in (1, processes)
    )
    assert {"loss", "class_loss", "kd_loss", "eval_ce", "eval_tokens"} <= set(logged)
    for key, value in logged.items():
        assert others[key] == pytest.approx(value, abs=1e-6), key
