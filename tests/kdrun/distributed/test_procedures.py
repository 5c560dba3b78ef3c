"""``kdrun --procedure`` in two processes: two processes are one run, whoever writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import kdrun_in_processes
from safetensors.torch import load_file

from kdrun.cli import cli

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUN = [
    *("--max-steps", "4", "--max-length", "32", "--seed", "2"),
    *("--set", "training.logging_steps=1", "--set", "training.eval_steps=1"),
    *("--set", "loss.compiled=false", "--set", "loss.chunk_size=64"),
    *("--set", "procedure.max_new_tokens=8", "--set", "data.cache_dir=none"),
    *("--set", "optimizer.lr=1e-4", "--set", "optimizer.warmup_steps=0"),
]


@pytest.mark.parametrize("spec", ["gkd:lambda=0.5", "distillm:margin=0,increase=0.9,capacity=8"])
def test_two_processes_draw_and_write_what_one_would(spec: str, tmp_path: Path) -> None:
    arguments = ["--procedure", spec, *RUN]
    if spec.startswith("distillm"):  # a loss that rises
        arguments += ["--lr", "0.2"]
    two = ["--batch-size", "4", "--output", tmp_path / "two"]
    for done in kdrun_in_processes(2, *arguments, *two):
        assert done.returncode == 0, done.stderr[-3000:]
    one = [*arguments, "--batch-size", "8", "--output", str(tmp_path / "one")]
    assert CliRunner().invoke(cli, one, catch_exceptions=False).exit_code == 0
    two_lines, lines = (
        list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()))
        for name in ("two", "one")
    )
    # At so high a rate the rounding of two halves grows.
    tolerance = 1e-2 if spec.startswith("distillm") else 1e-4
    for line, same in zip(lines, two_lines, strict=True):
        for key in ("student_share", "generated_tokens", "empty_generations", "phi", "buffer_rows"):
            assert line.get(key) == same.get(key), key
        if "kd_loss" in line:
            assert same["kd_loss"] == pytest.approx(line["kd_loss"], rel=tolerance)
    assert any(line.get("student_share", 0) > 0 for line in lines)
    ours, theirs = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("one", "two")
    )
    for name, weight in ours.items():
        # Where a gradient is about 0, AdamW steps by its sign.
        assert (theirs[name] - weight).abs().mean() <= tolerance, name
