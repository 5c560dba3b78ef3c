"""``training.torch_compile``: the same training, through compiled graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

Distil = Callable[..., Path]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_student_takes_the_same_steps(
    distil: Distil, still_student: Path, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    given = {"model__student": str(still_student)}
    plain = distil(tmp_path / "plain", **given)
    counters.clear()
    compiled = distil(tmp_path / "compiled", training__torch_compile=True, **given)
    assert counters["stats"]["unique_graphs"] > 0
    first, second = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        for run in (plain, compiled)
    )
    first, second = ([x for x in lines if "loss" in x] for lines in (first, second))
    for ours, theirs in zip(second, first, strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "class_loss", "kd_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    one, other = (load_file(run / "student" / "model.safetensors") for run in (plain, compiled))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (other[name] - weight).abs().max() < 1e-3, name
